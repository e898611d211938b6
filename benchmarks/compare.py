"""Two results of one device: do their ratios agree?"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.document import Ratio, ResultError, Source, turn_ratio
from benchmarks.units import plural
from graphmoe_kernels.cost.report import table

# What makes a device another one; the load of its host and the like may differ.
DEVICE_KEYS = ("kind", "name", "threads")


class Pair(NamedTuple):
    """A ratio as both results have it."""

    what: str
    first: Ratio
    second: Ratio

    @property
    def shift(self) -> float:
        """By how much the second is larger than the first."""
        return self.second.value / self.first.value - 1

    @property
    def agree(self) -> bool:
        """Whether the ranges have a point in common."""
        low, high = self.first.range or (self.first.value,) * 2
        other_low, other_high = self.second.range or (self.second.value,) * 2
        return low <= other_high and other_low <= high


def compare(first: Source, second: Source, across_devices: bool = False) -> str:
    """What differs between the two runs, every ratio that both have, and how many of them agree.

    Raises:
        ResultError: the devices differ and ``across_devices`` is not given, or no ratio is in both.
    """
    if not across_devices:
        _refuse_other_device(first, second)
    ratios = [_ratios(source.content["rows"]) for source in (first, second)]
    shared = [Pair(what, ratio, ratios[1][what]) for what, ratio in ratios[0].items() if what in ratios[1]]
    if not shared:
        raise ResultError(f"{first.path} and {second.path} have no ratio in common: no case and labels are in both")
    if first.path.resolve() == second.path.resolve():
        raise ResultError(f"{first.path} is named twice: name two results")
    header = ("time over time, median [lowest, highest] of the turns", "A", "B", "shift", "agree")
    rows = [
        [pair.what, str(pair.first), str(pair.second), f"{pair.shift:+.1%}", "yes" if pair.agree else "NO"]
        for pair in shared
    ]
    lines = [f"A: {first.path}", f"B: {second.path}", *_differences(first, second), "", table(header, rows), ""]
    for name, own in zip("AB", ratios, strict=True):
        if len(own) > len(shared):
            lines.append(f"{plural(len(own) - len(shared), 'ratio')} of {name} alone, not compared")
    shifts = sorted(abs(pair.shift) for pair in shared)
    lines.append(f"the medians differ by {statistics.median(shifts):.1%} in the middle and by {shifts[-1]:.1%} at most")
    lines.append(f"{sum(pair.agree for pair in shared)} of {len(shared):,} ratios agree within their ranges")
    return "\n".join(lines)


def _ratios(rows: list[dict[str, Any]]) -> dict[str, Ratio]:
    """Ratios turn by turn, by what they are of. One and its inverse are the same: the labels' order picks one."""
    by_name = {(row["case"], row["label"]): row for row in rows}
    found = {}
    for (case, label), row in by_name.items():
        for other in row["ratios"]:
            over, under = sorted((label, other), reverse=True)
            if (case, other) in by_name and (ratio := turn_ratio(by_name[case, over], by_name[case, under])):
                found[f"{case}: {over} over {under}"] = ratio
    return found


def _refuse_other_device(first: Source, second: Source) -> None:
    devices = [source.content["conditions"]["device"] for source in (first, second)]
    if any(devices[0].get(key) != devices[1].get(key) for key in DEVICE_KEYS):
        named = [", ".join(f"{key} {d[key]}" for key in DEVICE_KEYS if key in d) for d in devices]
        raise ResultError(
            f"these are results of different devices: {first.path} of {named[0]}; {second.path} of {named[1]}. "
            "Compare results of one device, or say --across-devices"
        )


def _differences(first: Source, second: Source) -> list[str]:
    """A line for each condition in which the runs differ."""
    flat = [_flat(source.content["conditions"]) for source in (first, second)]
    names = dict.fromkeys([*flat[0], *flat[1]])
    return [
        f"  {name}: A {flat[0].get(name, '-')}, B {flat[1].get(name, '-')}"
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]


def _flat(conditions: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in conditions.items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            found[f"{name} {key}".strip()] = str(inner)
    return found
