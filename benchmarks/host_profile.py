"""Which part of the packages the host's time of a call is spent for, by Python's own profiler."""

from __future__ import annotations

import cProfile
import pstats
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.devices import Call

# What a function's file is part of, by pieces of its path; the first that fits.
PLACES = {
    "Triton's binding": ("/triton/",),
    "launching": ("graphmoe_kernels/launching.py",),
    "routing": ("graphmoe_kernels/routing/", "rethinking/round_routing.py"),
    "experts": ("graphmoe_kernels/experts/", "graphmoe_kernels/mix", "graphmoe_kernels/dora.py"),
    "GRU": ("graphmoe_kernels/gru/",),
    "freshness of the fold": ("rethinking/cache.py", "rethinking/streams.py"),
    "rounds": ("graphmoe_kernels/",),
    "the layer's door": ("graphmoe_model/",),
}
# PyTorch's products, by whomever they are called.
PRODUCTS = re.compile(r"[ .'](linear|addmm_?|mm|matmul|bmm|baddbmm)[>']")
PARTS = (*reversed(PLACES), "products", "other")

Function = tuple[str, int, str]  # as pstats names one: file, line, name
Callers = dict[Function, dict[Function, Any]]


def split(call: Call) -> dict[str, float]:
    """Shares of the time of ``call`` by part, which sum to one.

    What belongs to no part (PyTorch, Python itself) counts for who called it. The profiler makes small Python functions
    dearer than they are, so the shares say where to look, not what a change would gain.
    """
    profiler = cProfile.Profile()
    profiler.runcall(call)
    return shares(pstats.Stats(profiler).stats)  # type: ignore[attr-defined]


def shares(stats: dict[Function, tuple[int, int, float, float, dict[Function, Any]]]) -> dict[str, float]:
    """The same from a profile as pstats has it: function -> (calls, calls, own time, time, callers)."""
    callers = {function: entry[4] for function, entry in stats.items()}
    found: Counter[str] = Counter()
    for function, (_, _, own, _, by_caller) in stats.items():
        own_times = {caller: times[2] for caller, times in by_caller.items()} or {function: own}
        for caller, seconds in own_times.items():
            for name, weight in _owners(function, callers, (), caller).items():
                found[name] += seconds * weight
    whole = sum(found.values()) or 1.0
    return {name: found[name] / whole for name in PARTS}


def part_of(function: Function) -> str | None:
    """The part that a function is in, or None."""
    path, _, name = function
    if path == "~" and PRODUCTS.search(name):
        return "products"
    path = Path(path).as_posix()
    return next((part for part, pieces in PLACES.items() if any(piece in path for piece in pieces)), None)


def _owners(
    function: Function, callers: Callers, seen: tuple[Function, ...], only: Function | None = None
) -> dict[str, float]:
    """For which parts a function was called, by its callers' time, or by the ``only`` one that counts."""
    if (part := part_of(function)) is not None:
        return {part: 1.0}
    above = {caller: times[3] for caller, times in callers.get(function, {}).items() if caller not in (*seen, function)}
    above = {only: 1.0} if only in above else above
    found: Counter[str] = Counter()
    for caller, seconds in above.items():
        for name, weight in _owners(caller, callers, (*seen, function)).items():
            found[name] += weight * seconds / (sum(above.values()) or 1.0)
    return dict(found) if sum(found.values()) else {"other": 1.0}
