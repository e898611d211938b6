"""The time that a run may take: what does not fit is left out, and said so."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Seconds from now, by a clock that tests replace.

    Args:
        seconds: how long the run may take.
        clock: seconds since some moment.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.start = clock()
        self.end = self.start + seconds

    def used(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.end - self.clock()

    def allows(self, seconds: float) -> bool:
        """Whether something that takes ``seconds`` ends in time."""
        return self.left() >= seconds
