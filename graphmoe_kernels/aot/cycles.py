"""Cycles of a program of a kernel, from what the listing says of its loops and from how often each runs."""

from __future__ import annotations

from collections.abc import Sequence

from graphmoe_kernels.aot.listing import Loop

# Passes until a pass takes as long as the one before.
STEADY = 4


def pass_cycles(loop: Loop, latency: int) -> float:
    """Cycles of a pass of one warp, waits for loads included; of what is in no loop, all of them."""
    delays: list[tuple[int, float]] = []  # from a cycle on, as the listing counts them

    def time(cycle: int) -> float:
        return cycle + next((delay for begin, delay in reversed(delays) if begin <= cycle), 0.0)

    marks = [0.0]
    for number in range(STEADY if loop.depth else 1):
        for at, issued in loop.waits:
            cycle, start = (number * loop.cycles + each for each in (at, issued))
            late = time(start) + latency - time(cycle) if start >= 0 else 0.0
            if late > 0:
                delays.append((cycle, (delays[-1][1] if delays else 0.0) + late))
        marks.append(delays[-1][1] if delays else 0.0)
    return loop.cycles + marks[-1] - marks[-2]


def program_cycles(loops: Sequence[Loop], passes: Sequence[float], latency: int) -> float:
    """Cycles of a program: ``passes`` are those of each loop in one pass of the loop around it."""
    return _summed(loops, passes, [pass_cycles(loop, latency) for loop in loops])


def issue_cycles(loops: Sequence[Loop], passes: Sequence[float]) -> float:
    """Cycles in which a warp's quarter of a multiprocessor issues a program's instructions."""
    return _summed(loops, passes, [loop.issue for loop in loops])


def _summed(loops: Sequence[Loop], passes: Sequence[float], cycles: Sequence[float]) -> float:
    found, runs = cycles[0], [1.0]  # how often a loop's surroundings run, by depth
    for loop, count, each in zip(loops[1:], passes[1:], cycles[1:], strict=True):
        del runs[loop.depth :]
        # A pass of each inner loop is in that of the outer one already.
        found += runs[-1] * (count - (loop.depth > 1)) * each
        runs.append(runs[-1] * count)
    return found
