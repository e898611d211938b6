"""A deprecated name that our own code uses is an error; what the dependencies do among themselves is theirs.

A module in a warnings filter does not say whose it is: many deprecations are issued without a ``stacklevel``, so the
module is the library's whoever called it. The stack knows.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

OURS = {
    "graphmoe_cli",
    "graphmoe_inference",
    "graphmoe_kernels",
    "graphmoe_model",
    "graphmoe_tables",
    "benchmarks",
    "tests",
}
# They only pass a call on: a warning, a module's forward, a decorator, a lazy import, a class that is built.
BETWEEN = {"warnings", "torch.nn.modules.module", "typing_extensions", "contextlib", "functools", "dataclasses"}


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def _passes_on(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name in BETWEEN or name.startswith("importlib")


def user_of_the_deprecated(frame: FrameType | None) -> FrameType | None:
    """Find the frame that uses what was deprecated: the first one outside the package that warns.

    Args:
        frame: the innermost frame, in which the warning is shown.

    Returns:
        The frame, or None where the stack does not tell.
    """
    while frame is not None and _passes_on(frame):
        frame = frame.f_back
    if frame is None or _package(frame) in OURS:  # a decorator warned for it, or Python did by itself
        return frame
    warns = _package(frame)
    if warns == "_pytest":  # pytest.warns issues again what it did not expect, long after the call
        return None
    while frame is not None and (_package(frame) == warns or _passes_on(frame)):
        frame = frame.f_back
    return frame


@contextmanager
def refused() -> Iterator[None]:
    """Raise the deprecations that our own code causes, and pass every other warning on.

    Raises:
        DeprecationWarning, FutureWarning: where our code uses a name that is going away.
    """
    pass_on = warnings.showwarning

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if issubclass(category, (DeprecationWarning, FutureWarning)):
            user = user_of_the_deprecated(sys._getframe(1))
            if user is not None and _package(user) in OURS:
                raise category(f"{user.f_code.co_filename}:{user.f_lineno} uses what is going away: {message}")
        pass_on(message, category, filename, lineno, *rest)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = pass_on
