"""How messages name modules: completely, as the name that is missing is the one that is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable


def last_names(modules: Iterable[str]) -> str:
    """List the last parts of module names for a message: all of them but numbers in a list."""
    return ", ".join(
        sorted({name.rpartition(".")[2] for name in modules if name and not name.rpartition(".")[2].isdigit()})
    )


def joined(names: Iterable[str]) -> str:
    """List module names for a message; those that differ in one layer's number share an entry: ``layers.{0, 3}.mlp``.

    None is left out: the one that is missing from a message is the one that has to be excluded.
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", f".{name}")
        key = (match[1][1:], match[3]) if match else (name, "")
        numbers.setdefault(key, []).extend([match[2]] if match else [])
    return ", ".join(
        f"{before}{found[0] if len(found) == 1 else '{' + ', '.join(found) + '}'}{after}" if found else before
        for (before, after), found in numbers.items()
    )


def as_written(value: object) -> str:
    """Show a field's value in a message; PEFT makes lists of names sets, which print in any order."""
    return repr(sorted(value) if isinstance(value, set) else value)
