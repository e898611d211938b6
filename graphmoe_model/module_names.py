"""Names of modules: without what wrappers put into them; complete in messages, as the missing one is the one needed."""

from __future__ import annotations

import re
from collections.abc import Iterable

ROOT = "base_model.model."  # what PEFT puts before the base model's names, in a PeftModel and in every checkpoint

# What activation checkpointing, torch.compile and FSDP1 put between a module's name and those of its parts.
_WRAPPERS = {"_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"}


def plain_name(name: str) -> str:
    """Remove from a module's or tensor's name what wrappers put into it, as adapters are saved without wrappers.

    ``layers.0._checkpoint_wrapped_module.mlp`` is ``layers.0.mlp``. Modules and their state dicts differ in this: some
    wrappers take their part out of the state dict by themselves.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


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
