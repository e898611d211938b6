"""Drawn arguments, good and bad, and the rule for them: a clear error or a right result.

Every run states how many draws it makes and from which seed, so that it can be made again.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import hypothesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

CLEAR = (ValueError, TypeError, NotImplementedError, ImportError, OSError)
OURS = ("graphmoe_kernels", "graphmoe_model")


def make_draws(check: Callable[[Any], None], strategy: SearchStrategy[Any], *, examples: int, seed: int) -> None:
    """Run ``check`` on so many draws from a seed; the smallest that fails is shown."""
    seen = 0

    def counted(drawn: Any) -> None:
        nonlocal seen
        seen += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a wild value may well be warned of
            check(drawn)

    print(f"{examples} draws from seed {seed}")
    run = given(strategy)(counted)
    options = {"deadline": None, "database": None, "derandomize": False, "suppress_health_check": list(HealthCheck)}
    hypothesis.seed(seed)(settings(max_examples=examples, **options)(run))()
    assert seen >= examples, f"{seen} draws of {examples}: there are no more to make"


def assert_clear(error: BaseException, names: Iterable[str], also_from: tuple[str, ...] = ()) -> None:
    """An exception that somebody meant: raised by a ``raise`` in our packages, and it names one of ``names``.

    ``also_from`` are further packages whose own refusals are as good.
    """
    assert isinstance(error, CLEAR), f"{type(error).__name__} is no refusal: {error}"
    assert any(name in str(error) for name in names), f"names none of the arguments: {error}"
    path, line = _origin(error.__traceback__)
    packages = (*OURS, *also_from)
    assert any(f"/{package}/" in path for package in packages), f"comes from {path}: {error}"
    assert line.startswith("raise"), f"nobody raised it: {line!r} in {path}: {error}"


def _origin(traceback: TracebackType | None) -> tuple[str, str]:
    """The file and the line in which an exception began."""
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    path = traceback.tb_frame.f_code.co_filename
    return path, linecache.getline(path, traceback.tb_lineno).strip()
