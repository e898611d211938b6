"""The plots of one result, drawn with matplotlib and without a display; a provider keeps its colour in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.document import conditions_line, turn_ratio
from graphmoe_model.presentation import BACKING, INK, MUTED, STYLE

# Colour and marker by provider. Paul Tol's "muted" scheme, made for readers with any colour vision; shapes tell apart
# what colours might not.
LOOKS = {
    **{"triton": ("#332288", "o"), "torch": ("#44AA99", "s"), "literal": ("#CC6677", "D"), "dense": ("#1f2933", "x")},
    **{"literal_compiled": ("#882255", "^"), "peft_lora": ("#DDCC77", "P"), "liger": ("#88CCEE", "*")},
    **{"peer_mixlora": ("#117733", "X"), "mixlora": ("#AA4499", "p"), "reference": ("#999933", "v")},
}
OTHER_LOOK = (MUTED, "+")
PAPER_ROUND = 0.16  # a further round of inference over T=1, the paper's Fig 5c


class NoRows(ValueError):
    """A result lacks what a plot shows; the message says what."""


class Drawn(NamedTuple):
    """A plot's title, and its file or why there is none."""

    name: str
    path: Path | None
    reason: str = ""


def draw(content: dict[str, Any], folder: Path, prefix: str) -> list[Drawn]:
    """Write every plot that the result has rows for, as ``<prefix>-<plot>.png`` in a folder that exists."""
    found = []
    with matplotlib.rc_context(STYLE):
        for plot, title in PLOTS.items():
            try:
                figure = plot(content)
            except NoRows as error:
                found.append(Drawn(title, None, str(error)))
                continue
            figure.suptitle(f"{title}\n{conditions_line(content)}", x=0.01, ha="left", fontsize=11)
            path = folder / f"{prefix}-{plot.__name__.replace('_', '-')}.png"
            figure.savefig(path, dpi=150)
            found.append(Drawn(title, path))
    return found


def latency_over_rounds(content: dict[str, Any]) -> Figure:
    """Time of T rounds over that of one, a panel for each case; in inference beside the paper's 1 + 0.16 (T - 1)."""
    by_case: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}  # case -> provider -> T -> row
    for row in content["rows"]:
        if row["group"] in ("rounds", "decoder"):
            by_case.setdefault(row["case"], {}).setdefault(row["provider"], {})[row["sizes"]["rounds"]] = row
    lines = {
        case: {provider: rows for provider, rows in of_case.items() if 1 in rows and len(rows) > 1}
        for case, of_case in by_case.items()
    }
    lines = {case: of_case for case, of_case in lines.items() if of_case}
    if not lines:
        raise NoRows("no rows of the groups rounds and decoder with T=1 and another T")
    figure, axes = _panels(list(lines))
    for ax, of_case in zip(axes, lines.values(), strict=True):
        all_rows = [row for rows in of_case.values() for row in rows.values()]
        if all_rows[0]["mode"] != "training":
            rounds = sorted({row["sizes"]["rounds"] for row in all_rows})
            paper = [1 + PAPER_ROUND * (t - 1) for t in rounds]
            ax.plot(rounds, paper, color=MUTED, dashes=(4, 3), linewidth=1.2, label="paper: 1 + 0.16 (T - 1)")
        for provider, rows in of_case.items():
            colour, marker = LOOKS.get(provider, OTHER_LOOK)
            found = {t: ratio for t, row in rows.items() if t > 1 and (ratio := turn_ratio(row, rows[1]))}
            values = {1: 1.0} | {t: ratio.value for t, ratio in sorted(found.items())}
            ax.plot(list(values), list(values.values()), color=colour, marker=marker, markersize=5, label=provider)
            for t, ratio in found.items():
                ax.vlines(t, *(ratio.range or (ratio.value,) * 2), color=colour, linewidth=1)
        ax.legend(frameon=False, fontsize=9, loc="upper left")
        ax.set(xlabel="rounds T", ylabel="time over that of T=1")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A grid of titled panels, two to a line."""
    columns = min(2, len(titles))
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(7.5 * columns, 1.0 + 3.4 * lines), layout="constrained")  # not pyplot: no global state
    grid = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for ax, title in zip(grid, titles, strict=False):
        ax.set_title(title)
    for ax in grid[len(titles) :]:  # what is left of the last line
        ax.remove()
    return figure, grid[: len(titles)]


def roofline(content: dict[str, Any]) -> Figure:
    """Operations per second against operations per byte, a panel for each group, under the limits of the same run."""
    limits = content["limits"]
    if not {"copy bytes a second", "matrix operations a second"} <= limits.keys():
        raise NoRows("no measured limits")
    rows = [r for r in content["rows"] if (w := r.get("work")) and w["bytes"] and w["operations"]]
    rows = [r for r in rows if r["sizes"]["dtype"] == limits.get("matrix dtype", r["sizes"]["dtype"])]
    if not rows:
        raise NoRows("no rows with bytes and operations in the dtype of the measured limits")
    copy, matrix = limits["copy bytes a second"], limits["matrix operations a second"]
    groups = list(dict.fromkeys(r["group"] for r in rows))
    figure, axes = _panels(groups)
    intensity = [r["work"]["operations"] / r["work"]["bytes"] for r in rows]
    ends = [min(*intensity, matrix / copy) / 2, matrix / copy, max(*intensity, matrix / copy) * 2]
    note: Any = {"textcoords": "offset points", "fontsize": 9, "color": INK, "bbox": BACKING}
    for ax, group in zip(axes, groups, strict=True):
        ax.plot(ends, [min(x * copy, matrix) for x in ends], color=INK, linewidth=1.5)
        ax.annotate(f"{matrix / 1e12:,.3g} TFLOP/s", (ends[2], matrix), xytext=(0, 8), ha="right", **note)
        ax.annotate(f"{copy / 1e12:,.3g} TB/s", (ends[0], ends[0] * copy), xytext=(8, 0), va="top", **note)
        for row, x in zip(rows, intensity, strict=True):
            if row["group"] == group:
                colour, marker = LOOKS.get(row["provider"], OTHER_LOOK)
                reached = row["work"]["operations"] / row["seconds"]["median"]
                ax.plot(x, reached, marker=marker, color=colour, markersize=6, fillstyle="none")
        ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    keys = []
    for provider in dict.fromkeys(r["provider"] for r in rows):
        colour, marker = LOOKS.get(provider, OTHER_LOOK)
        keys.append(Line2D([], [], color=colour, marker=marker, fillstyle="none", linestyle="none", label=provider))
    figure.legend(handles=keys, frameon=False, loc="outside lower left", ncols=len(keys))
    return figure


PLOTS: dict[Callable[[dict[str, Any]], Figure], str] = {
    latency_over_rounds: "Latency against T, relative to T=1",
    roofline: "Roofline: what is reached of the measured limits",
}
