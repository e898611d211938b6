"""Which checks are on. All are, unless a test switches one off to show what it hides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager


@dataclasses.dataclass
class Checks:
    """The checks of the interpreter by name; each module says what its check is for."""

    poison: bool = True
    bounds: bool = True
    races: bool = True


ACTIVE = Checks()


@contextmanager
def checks(**changes: bool) -> Iterator[None]:
    """Switch checks on or off for a while: ``with checks(bounds=False): ...``"""
    before = dataclasses.asdict(ACTIVE)
    for name, value in dataclasses.asdict(dataclasses.replace(ACTIVE, **changes)).items():
        setattr(ACTIVE, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(ACTIVE, name, value)
