"""From a Chrome trace of `torch.profiler` to seconds by category: every nanosecond is counted once.

The trace is read because it says in fields what the profiler's event objects do not: which call of the runtime or
driver launched a kernel. So a kernel belongs to the range that was open when it was launched, whoever launched it (an
operator, Triton), and however much later it ran.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from graphmoe_kernels import RANGE_PREFIX
from graphmoe_model.profiling.result import CATEGORIES

FORWARD = "forward"  # the range around a whole forward; what no other range claims of it is "other"
ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})


class _Range(NamedTuple):
    """A range on a host thread, in nanoseconds."""

    start: int
    duration: int
    category: str

    def order(self) -> tuple[int, int, bool]:
        """Order by time, and a range before what lies in it."""
        return self.start, -self.duration, self.category != FORWARD


class _Launch(NamedTuple):
    """A launch on a host thread, and how long what it launched ran on the device, in nanoseconds."""

    start: int
    spent: int

    def order(self) -> tuple[int, int, bool]:
        """Order after the range that it starts in, which is the one that counts."""
        return self.start, 0, True


class _Open(NamedTuple):
    end: int
    category: str
    forward: int


def attribute(events: Iterable[dict[str, Any]], on_device: bool) -> list[dict[str, float]]:
    """Compute the seconds of every category in every `FORWARD` range of a trace, in order of time.

    Args:
        events: the trace's ``traceEvents``.
        on_device: count what ran on the device, by the range it was launched in; else the ranges' own time on the host,
            without that of the ranges inside them.

    Raises:
        ValueError: the trace has no forward; a range of no known category; with ``on_device``, nothing that ran
            on a device, or something whose launch is not on record.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    threads: dict[Any, list[_Range | _Launch]] = defaultdict(list)
    for thread, ranges in _ranges(complete).items():
        threads[thread] += ranges
    if on_device:
        for thread, launches in _launches(complete).items():
            threads[thread] += launches
    found = [forward for points in threads.values() for forward in _walk(sorted(points, key=_order), on_device)]
    if not found:
        raise ValueError(f"the trace has no range {RANGE_PREFIX}{FORWARD}: it is not one of a profile")
    found.sort(key=lambda pair: pair[0])
    return [{name: spent / 1e9 for name, spent in seconds.items()} for _, seconds in found]


def last_forward(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the events from the last forward's start on, and the trace's names of processes and threads."""
    start = max(event["ts"] for event in events if event.get("name") == RANGE_PREFIX + FORWARD)
    return [event for event in events if event.get("ph") == "M" or event.get("ts", start) >= start]


def _nanoseconds(microseconds: float) -> int:
    return round(1000 * microseconds)


def _ranges(events: list[dict[str, Any]]) -> dict[Any, list[_Range]]:
    """Collect our ranges by host thread; their mirror images on the device's timeline have another category."""
    threads: dict[Any, list[_Range]] = defaultdict(list)
    for event in events:
        if event.get("cat") != "user_annotation" or not event["name"].startswith(RANGE_PREFIX):
            continue
        name = event["name"].removeprefix(RANGE_PREFIX)
        if name != FORWARD and name not in CATEGORIES:
            raise ValueError(f"the trace has a range {event['name']!r}; expected one of {', '.join(CATEGORIES)}")
        own = _Range(_nanoseconds(event["ts"]), _nanoseconds(event["dur"]), name)
        threads[event["pid"], event["tid"]].append(own)
    return threads


def _launches(events: list[dict[str, Any]]) -> dict[Any, list[_Launch]]:
    """Collect the launches of all that ran on a device, by host thread; one can start many kernels (a CUDA graph)."""
    spent: dict[int, int] = defaultdict(int)
    for event in events:
        if event.get("cat") in ON_DEVICE:
            spent[event["args"]["correlation"]] += _nanoseconds(event["dur"])
    if not spent:
        raise ValueError(
            "the profiler recorded nothing that ran on the device; it needs CUPTI (or roctracer) and the permission to "
            "use it (NVIDIA: NVreg_RestrictProfilingToAdminUsers=0), and no other profiler attached"
        )
    threads: dict[Any, list[_Launch]] = defaultdict(list)
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if event.get("cat") in LAUNCHES and correlation in spent:
            launch = _Launch(_nanoseconds(event["ts"]), spent.pop(correlation))
            threads[event["pid"], event["tid"]].append(launch)
    if spent:
        raise ValueError(
            f"{len(spent)} of the device's activities have no launch on record: the profiler's buffers overflowed; "
            "profile fewer repetitions or a shorter sequence"
        )
    return threads


def _order(point: _Range | _Launch) -> tuple[int, int, bool]:
    return point.order()


def _walk(points: list[_Range | _Launch], on_device: bool) -> list[tuple[int, dict[str, int]]]:
    """Sum up every forward of one thread: its start and the nanoseconds of every category."""
    forwards: list[tuple[int, dict[str, int]]] = []
    stack: list[_Open] = []
    for point in points:
        while stack and stack[-1].end <= point.start:
            stack.pop()
        if isinstance(point, _Launch):
            if stack:  # else before or after a forward
                forwards[stack[-1].forward][1][stack[-1].category] += point.spent
            continue
        if point.category == FORWARD:
            forwards.append((point.start, dict.fromkeys(CATEGORIES, 0)))
        elif not stack:  # before or after a forward
            continue
        category = "other" if point.category == FORWARD else point.category
        if not on_device:
            forwards[-1][1][category] += point.duration
            if stack:  # a range's time is not its parent's
                forwards[-1][1][stack[-1].category] -= point.duration
        stack.append(_Open(point.start + point.duration, category, len(forwards) - 1))
    return forwards
