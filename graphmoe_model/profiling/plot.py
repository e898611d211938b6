"""The profiles as a picture: shares against the sequence's length, a panel for every phase and adapter."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from graphmoe_model.pictures import write_picture
from graphmoe_model.presentation import INK, MUTED, STYLE
from graphmoe_model.profiling.result import CATEGORIES, TITLES, Profile

# Distinguishable in every common form of colour blindness, and in their order also in grey.
COLOURS = {
    "attention": "#2f5fd0",
    "mlp": "#e0803a",
    "experts": "#f2b880",
    "routing": "#8a5a2b",
    "gru": "#2a9d6f",
    "other": "#d5dbe3",
}
LABELLED = 0.045  # the smallest share whose figure fits into its bar


def draw_shares(profiles: list[Profile], conditions: str, path: Path) -> list[str]:
    """Write the picture: stacked shares of `CATEGORIES`, phases in rows, adapters in columns."""
    phases = list(dict.fromkeys(p.phase for p in profiles))
    adapters = list(dict.fromkeys(p.adapter for p in profiles))
    with matplotlib.rc_context(STYLE):
        size = (1.2 + 2.9 * len(adapters), 1.3 + 2.9 * len(phases))
        figure = Figure(figsize=size, layout="constrained")  # not pyplot: no window, no global state
        panels = figure.subplots(len(phases), len(adapters), squeeze=False, sharey=True)
        for row, phase in zip(panels, phases, strict=True):
            for axes, adapter in zip(row, adapters, strict=True):
                _stack(axes, [p for p in profiles if (p.phase, p.adapter) == (phase, adapter)])
                axes.set_title(f"{phase}, {'no adapter' if adapter == 'none' else adapter}")
        for axes in panels[-1]:
            axes.set_xlabel("tokens")
        figure.suptitle(f"Where the time of {profiles[0].model} goes", x=0.01, ha="left", fontsize=12)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, reverse=True)
        figure.supxlabel(conditions, x=0.01, ha="left", fontsize=7, color=MUTED, wrap=True)
        return write_picture(figure, path)


def _stack(axes: Axes, profiles: list[Profile]) -> None:
    bottoms = [0.0] * len(profiles)
    for category in CATEGORIES:
        shares = [profile.share(category) for profile in profiles]
        title, colour = TITLES[category], COLOURS[category]
        bars = axes.bar(range(len(profiles)), shares, 0.8, bottoms, color=colour, label=title)
        figures = [f"{share:.0%}" if share >= LABELLED else "" for share in shares]
        ink = "white" if category in ("attention", "routing", "gru") else INK
        axes.bar_label(bars, figures, label_type="center", color=ink, fontsize=8)
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
    axes.set_xticks(range(len(profiles)), [str(profile.tokens) for profile in profiles])
    axes.set_ylim(0, 1)
    axes.grid(False)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
