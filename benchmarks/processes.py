"""Work that several processes do beside each other on one machine: compilations, each of which takes one core."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

# Each has a context on the device, of some 0.5 GB, beside what it computes on.
MOST = 12


def count() -> int:
    """How many there are: two cores are left to the process that times."""
    return max(1, min(MOST, (os.cpu_count() or 1) - 2))


@functools.cache
def _pool() -> ProcessPoolExecutor:
    """The processes, for the whole run; started anew, as a forked one has no CUDA."""
    return ProcessPoolExecutor(count(), multiprocessing.get_context("spawn"))


def results(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], lost: Any) -> list[Any]:
    """Return what ``function``, of a module, gives for the arguments of each of ``calls``, in order.

    Where a process dies of a call, nobody knows of which: that call and those that had not ended give ``lost``, and
    the next ones get new processes.
    """
    futures = [_pool().submit(function, *arguments) for arguments in calls]
    found = []
    for future in futures:
        try:
            found.append(future.result())
        except BrokenProcessPool:
            _pool.cache_clear()
            found.append(lost)
    return found
