"""What a field of a recipe is: its kind, its range, its help, and the errors that name it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """One field of a recipe, which is an option of the command line and a key of the file too.

    Attributes:
        kind: the type of its values; ``tuple`` is a tuple of texts.
        panel: the group of options that it is in.
        help: what it means.
        least, most: the range of a number.
        above: what a number must be larger than, in place of ``least``.
        choices: the texts that it may be; None for any.
        unset: what an unset one stands for, where its default is None.
        todo: what to do about a wrong value, where that is more than to leave it out.
    """

    kind: type
    panel: str
    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | None = None
    unset: str | None = None
    todo: str | None = None

    @property
    def expected(self) -> str:
        """What its values are, in words."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "a text that is not empty"
        if self.kind is tuple:
            return "a list of names"
        words = "a whole number" if self.kind is int else "a number"
        if self.above is not None:
            words += f" above {self.above:g}"
        if self.least is not None:
            words += f" of at least {self.least:g}"
        return words + ("" if self.most is None else f" and at most {self.most:g}")

    def read(self, value: Any) -> Any:
        """Return the value as the recipe holds it; ``ValueError`` (without the field's name) if it is none.

        YAML 1.1 reads ``2e-4`` as a text and a list where a tuple is meant: both are taken as they are meant.
        """
        if self.kind is tuple and isinstance(value, str):
            value = (value,)
        if self.kind is tuple and isinstance(value, list | tuple):
            if all(isinstance(part, str) and part for part in value) and value:
                return tuple(value)
            raise ValueError
        if self.kind is float and isinstance(value, str):
            value = float(value)
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.kind is str and self.choices is None and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # num_experts: 8
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError
        if self.choices is not None and value not in self.choices:
            raise ValueError
        if isinstance(value, str) and not value:
            raise ValueError
        if isinstance(value, int | float) and self.kind is not bool and not self._in_range(value):
            raise ValueError
        return value

    def _in_range(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )


def option(kind: type, panel: str, text: str, default: Any = None, **more: Any) -> Any:
    """Return a dataclass field that is described by a `Field`."""
    return dataclasses.field(default=default, metadata={"field": Field(kind, panel, text, **more)})


def field_of(field: dataclasses.Field[Any]) -> Field:
    """Return what describes a dataclass field."""
    described: Field = field.metadata["field"]
    return described


def flag(name: str) -> str:
    """Return the option that sets a field."""
    return f"--{name.replace('_', '-')}"


def checked(name: str, field: Field, default: Any, value: Any) -> Any:
    """Return a value as the recipe holds it.

    Raises:
        ValueError: names the field, the value, what was expected and what to do.
    """
    if value is None or (value in ("", (), []) and default in ("", ())):
        return default  # one that has to be given is asked for by the recipe
    try:
        return field.read(value)
    except ValueError:
        todo = field.todo
        if todo is None:
            instead = field.unset if default is None else _shown(default)
            todo = f"leave it out for {instead}" if instead not in ("", "()") else "correct it"
        raise ValueError(f"{name} ({flag(name)}) must be {field.expected}, got {value!r}; {todo}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that an unknown one was most probably meant to be, as words for a message; or none."""
    found = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _shown(default: Any) -> str:
    return {True: "true", False: "false"}[default] if isinstance(default, bool) else str(default)
