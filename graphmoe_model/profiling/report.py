"""The profiles as files and as a table for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graphmoe_model.presentation import markdown_table
from graphmoe_model.profiling.result import Profile
from graphmoe_tables.printing import print_whole

MLP = ("mlp", "experts", "routing")  # what stands in the MLP's place
HEADINGS = (
    *("adapter", "tokens", "ms", "ms without profiler", "attention", "MLP", "of it base", "experts", "routing"),
    *("GRU", "other", "spread"),
)
LEGEND = (
    "ms: sum of the categories, the {clock}. MLP: base + experts + routing. Medians; spread: half of the widest range "
    "of any share over the repetitions, in percentage points."
)

UNSTEADY = 0.1  # the range of a share, over the repetitions, from which the medians say little


def write_report(profiles: list[Profile], conditions: dict[str, Any], folder: Path) -> None:
    """Write ``profile.json`` and ``profile.md`` into the folder."""
    entries = [
        {
            **profile.as_dict(),
            "spread": profile.spread,
            "wall_seconds": profile.wall_seconds,
            "profiled_wall_seconds": profile.profiled_wall_seconds,
            "repetitions": profile.repetitions,
        }
        for profile in profiles
    ]
    document = {"conditions": conditions, "profiles": entries}
    (folder / "profile.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / "profile.md").write_text(markdown(profiles, conditions), encoding="utf-8")


def markdown(profiles: list[Profile], conditions: dict[str, Any]) -> str:
    """Write the tables as Markdown, with the conditions under them."""
    lines = [f"# Where the time of {profiles[0].model} goes", ""]
    for phase, rows in _phases(profiles).items():
        lines += [f"## {phase.capitalize()}", "", *markdown_table(HEADINGS, [_cells(profile) for profile in rows]), ""]
    lines += [f"**{warning}**\n" for warning in warnings(profiles, conditions)]
    lines += [_legend(conditions), "", "Conditions: " + describe(conditions) + "."]
    return "\n".join(lines) + "\n"


def print_report(profiles: list[Profile], conditions: dict[str, Any], console: Console) -> None:
    """Print a table for every phase."""
    for phase, rows in _phases(profiles).items():
        table = Table(title=f"{profiles[0].model}, {phase}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "adapter" else "right")
        for profile in rows:
            table.add_row(*_cells(profile))
        print_whole(table, console)
        console.print()
    console.print(_legend(conditions), highlight=False)
    console.print(describe(conditions), highlight=False)
    for warning in warnings(profiles, conditions):
        console.print(warning, style="yellow", markup=False, highlight=False)


def warnings(profiles: list[Profile], conditions: dict[str, Any]) -> list[str]:
    """Say why the figures are not to be trusted: a machine that was busy when they were begun, shares that jump."""
    found = []
    load, cores, threads = conditions["load average"], conditions["cores"], conditions["threads"]
    if load is not None and load + threads > cores + 0.5:  # half a core: the command's own start
        found.append(
            f"Warning: the machine was busy (a load of {load:.1f} on {cores} cores, of which this took {threads}): "
            "times and shares may be far off. Measure when it is quiet, or with fewer --threads."
        )
    jumping = [
        f"{profile.adapter}, {profile.phase} of {profile.tokens} tokens"
        for profile in profiles
        if max(high - low for low, high in profile.spread.values()) > UNSTEADY
    ]
    if jumping:
        found.append(
            f"Warning: shares ranged over more than {UNSTEADY:.0%} of the forward in {'; '.join(jumping)}. Repeat it, "
            "with more --repetitions."
        )
    return found


def describe(conditions: dict[str, Any]) -> str:
    """Write the conditions on one line."""
    return ", ".join(f"{name} {value}" for name, value in conditions.items())


def _phases(profiles: list[Profile]) -> dict[str, list[Profile]]:
    return {phase: [p for p in profiles if p.phase == phase] for phase in dict.fromkeys(p.phase for p in profiles)}


def _cells(profile: Profile) -> list[str]:
    spread = max(high - low for low, high in profile.spread.values()) / 2
    columns = (("attention",), MLP, ("mlp",), ("experts",), ("routing",), ("gru",), ("other",))
    return [
        profile.adapter,
        str(profile.tokens),
        f"{1e3 * profile.total:.2f}",
        f"{1e3 * profile.wall_seconds:.2f}",
        *(f"{profile.share(*categories):.1%}" for categories in columns),
        f"{100 * spread:.1f}",
    ]


def _legend(conditions: dict[str, Any]) -> str:
    on_gpu = conditions["device"].startswith("cuda")
    clock = "time that kernels ran on the GPU" if on_gpu else "elapsed time of the profiled forward"
    return LEGEND.format(clock=clock)
