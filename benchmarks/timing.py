"""Timing calls in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

MIN_TURNS = 5
MAX_TURNS = 100


class Timing(NamedTuple):
    """Seconds of every call of one provider, in turn order.

    Attributes:
        wall: elapsed.
        cpu: of the process, all its threads: what remains comparable while other programs use the machine.
    """

    wall: list[float]
    cpu: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def best(self) -> float:
        return min(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the elapsed time: its spread."""
        low, _, high = statistics.quantiles(self.wall, n=4, method="inclusive")
        return low, high


def in_turns(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Times every call once a turn until ``seconds`` have passed, and at least `MIN_TURNS` times.

    The order is drawn anew for every turn (from a fixed seed): each call follows each other one, so none is always the
    one that finds a warm or a cold cache.
    """
    found = {name: Timing([], []) for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            found[name].cpu.append(time.process_time() - cpu)
            found[name].wall.append(time.perf_counter() - wall)
    return found


class Replay:
    """A clock for pytest-benchmark that shows times measured before.

    pytest-benchmark times one test to its end before the next; in turns it cannot. So the calls are timed by `in_turns`
    and each test plays its provider's times back, which brings them into its tables and files.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
