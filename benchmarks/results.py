"""What a run found: its ratios against their targets, as a table and as a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.groups import Group
from graphmoe_kernels.cost import multiply_adds
from graphmoe_kernels.cost.report import table

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"folded": "folded", "literal": "literal", "reference": "literal", "peer_mixlora": "peers"}


class Target(NamedTuple):
    """How many times faster ``fast`` is to be than ``slow`` in a case; None where the ratio is only reported."""

    case: str
    fast: str
    slow: str
    at_least: float | None
    note: str = ""


class Ratio(NamedTuple):
    """A target as it was found.

    Attributes:
        wall: ratio of the medians of elapsed time, by which the target is met or missed.
        best: ratio of the shortest elapsed times: the least disturbed where other programs use the machine.
        cpu: ratio of the medians of CPU time; with several threads it holds their waiting for each other.
        arithmetic: ratio of the executed multiply-adds of a forward (None for a training step).
    """

    target: Target
    wall: float
    best: float
    cpu: float
    arithmetic: float | None

    @property
    def verdict(self) -> str:
        if self.target.at_least is None:
            return "-"
        return "met" if self.wall >= self.target.at_least else "missed"


def ratios(groups: Sequence[Group], targets: Sequence[Target]) -> list[Ratio]:
    """The targets whose two providers were both timed."""
    found = []
    for target in targets:
        for group in groups:
            if group.case.name != target.case or not {target.fast, target.slow} <= group.timings.keys():
                continue
            fast, slow = group.timings[target.fast], group.timings[target.slow]
            arithmetic = None
            if group.case.mode == "inference":
                costs = [
                    multiply_adds(FORMS[name], group.case.sizes, "executed") for name in (target.slow, target.fast)
                ]
                arithmetic = costs[0] / costs[1]
            found.append(
                Ratio(
                    target,
                    slow.median / fast.median,
                    slow.best / fast.best,
                    slow.cpu_median / fast.cpu_median,
                    arithmetic,
                )
            )
    return found


def conditions(device: str, load: float | None) -> dict[str, Any]:
    """Device (with its `load_average` before the run), versions, commit, date: what a figure must never be without."""
    return {
        "device": {
            "kind": device,
            "cpu": _cpu_model(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load average": load,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "graphmoe": _version(),
        },
        "commit": checked_out_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def load_average() -> float | None:
    """How many processes were running over the last minute, where the system tells."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version() -> str:
    """The installed package's version; "not installed" where it runs from its checkout."""
    try:
        return metadata.version("graphmoe")
    except metadata.PackageNotFoundError:
        return "not installed"


def checked_out_commit() -> str:
    """The checked-out commit, with ``+`` if the tree differs from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(found: dict[str, Any], groups: Sequence[Group], measured: Sequence[Ratio]) -> str:
    """The tables that a run ends with."""
    device, versions = found["device"], found["versions"]
    s = groups[0].case.sizes
    lines = [
        f"{device['cpu']} ({device['vector instructions']}), {device['threads']} threads of {device['cores']} cores, "
        f"load average before {device['load average']}; torch {versions['torch']}, commit {found['commit'][:10]}",
        f"D={s.hidden} F={s.intermediate} experts={s.experts} top-k={s.top_k} rank={s.rank} GRU={s.gru_width}, "
        f"{s.tokens} tokens, {s.dtype}; every provider timed kept the error budget against fp64",
        "",
    ]
    rows = []
    for group in groups:
        for name, timing in group.timings.items():
            low, high = timing.quartiles
            milliseconds = (timing.median, low, high, timing.best, timing.cpu_median)
            rows.append(
                [f"{group.case.name}: {name}", *(f"{1e3 * t:,.1f}" for t in milliseconds), str(len(timing.wall))]
            )
    lines += [table(["ms", "median", "1st quartile", "3rd quartile", "best", "CPU median", "turns"], rows), ""]
    lines.append(
        table(["times faster", "medians", "best", "CPU time", "arithmetic", "target", ""], map(_ratio_row, measured))
    )
    if device["load average"] is not None and device["load average"] > 0.25 * device["cores"]:
        lines.append("  The machine was busy with other work: medians say little, the best times more. Run it again.")
    return "\n".join(lines)


def _ratio_row(ratio: Ratio) -> list[str]:
    target = ratio.target
    name = f"{target.case}: {target.fast} over {target.slow}{target.note}"
    arithmetic = "-" if ratio.arithmetic is None else f"{ratio.arithmetic:.2f}"
    wanted = "-" if target.at_least is None else f">= {target.at_least}"
    found = [f"{value:.2f}" for value in (ratio.wall, ratio.best, ratio.cpu)]
    return [name, *found, arithmetic, wanted, ratio.verdict]


def save(folder: Path, found: dict[str, Any], groups: Sequence[Group], measured: Sequence[Ratio]) -> Path:
    """Writes ``<device>-<date>-<commit>.json`` and returns its path."""
    content = {
        **found,
        "groups": [
            {
                "case": {**asdict(g.case.sizes), "mode": g.case.mode},
                "refused": g.refused,
                "seconds": {
                    name: {
                        "median": t.median,
                        "quartiles": list(t.quartiles),
                        "best": t.best,
                        "cpu median": t.cpu_median,
                        "turns": len(t.wall),
                    }
                    for name, t in g.timings.items()
                },
            }
            for g in groups
        ],
        "ratios": [
            {
                **r.target._asdict(),
                "medians": r.wall,
                "best": r.best,
                "cpu time": r.cpu,
                "arithmetic": r.arithmetic,
                "verdict": r.verdict,
            }
            for r in measured
        ],
    }
    day = found["date"][:10]
    path = folder / f"{found['device']['kind']}-{day}-{found['commit'][:10]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
