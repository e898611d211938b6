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

from benchmarks.document import Ratio, turn_ratio
from benchmarks.targets import short_commit
from benchmarks.units import plural
from graphmoe_model.presentation import BACKING, INK, MUTED, STYLE

# Colour and marker by provider. Paul Tol's "muted" scheme, made for readers with any colour vision; shapes tell apart
# what colours might not.
LOOKS = {
    "triton": ("#332288", "o"),
    "torch": ("#44AA99", "s"),
    "reference": ("#999933", "v"),
    "literal": ("#CC6677", "D"),
    "literal_compiled": ("#882255", "^"),
    "dense": ("#1f2933", "x"),
    "peft_lora": ("#DDCC77", "P"),
    "liger": ("#88CCEE", "*"),
    "peer_mixlora": ("#117733", "X"),
    "mixlora": ("#AA4499", "p"),
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
            figure.suptitle(f"{title}\n{_conditions(content)}", x=0.01, ha="left", fontsize=11)
            path = folder / f"{prefix}-{plot.__name__.replace('_', '-')}.png"
            figure.savefig(path, dpi=150)
            found.append(Drawn(title, path))
    return found


def _conditions(content: dict[str, Any]) -> str:
    c = content["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items() if version != "missing")
    return f"{c['device']['name']}; commit {short_commit(c['commit'])}, {c['date'][:10]}\n{versions}"


def latency_over_rounds(content: dict[str, Any]) -> Figure:
    """Time of T rounds over that of one; in inference beside the paper's 1 + 0.16 (T - 1)."""
    of_panel: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["group"] in ("rounds", "decoder"):
            of_panel.setdefault((row["group"], row["model"], row["mode"]), []).append(row)
    panels = []
    for (*_, mode), rows in of_panel.items():
        title, series = _series(rows)
        lines = {label: (each[0]["provider"], _relative(each)) for label, each in series.items()}
        if lines := {label: line for label, line in lines.items() if len(line[1]) > 1}:
            panels.append((title, mode, lines))
    if not panels:
        raise NoRows("no rows of the groups rounds and decoder with T=1 and another T")
    figure, axes = _panels([title for title, *_ in panels])
    for ax, (_, mode, lines) in zip(axes, panels, strict=True):
        if mode != "training":
            rounds = sorted({t for _, points in lines.values() for t in points})
            paper = [1 + PAPER_ROUND * (t - 1) for t in rounds]
            ax.plot(rounds, paper, color=MUTED, dashes=(4, 3), linewidth=1.2, label="paper: 1 + 0.16 (T - 1)")
        _draw_lines(ax, lines)
        ax.set(xlabel="rounds T", ylabel="time over that of T=1")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _series(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """A panel's title of the traits that all rows share, and its lines by the traits in which they differ."""
    traits = []
    for row in rows:
        sizes, context = row["sizes"], row.get("context")
        shown = {name: row[name] for name in ("provider", "group", "model", "mode")}
        shown |= {"tokens": plural(sizes["tokens"], "token"), "context": f"{context:,} cached" if context else ""}
        shown |= {"experts": f"n={sizes['experts']}", "dtype": sizes["dtype"]}
        traits.append(shown | {"graph": "in a graph" if row["graph"] else ""})
    varying = [name for name in traits[0] if name == "provider" or len({t[name] for t in traits}) > 1]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row, of_row in zip(rows, traits, strict=True):
        lines.setdefault(", ".join(of_row[name] for name in varying if of_row[name]), []).append(row)
    return ", ".join(text for name, text in traits[0].items() if name not in varying and text), lines


def _relative(rows: Sequence[dict[str, Any]]) -> dict[int, Ratio]:
    """Each T's time over that of T=1, turn by turn where there is such a ratio; nothing without a row of T=1."""
    bases = [row for row in rows if row["sizes"]["rounds"] == 1]
    points = {}
    for row in sorted(rows, key=lambda row: row["sizes"]["rounds"]) if bases else ():
        base = next((each for each in bases if each["case"] == row["case"]), bases[0])
        ratio = Ratio(1.0) if row is base else turn_ratio(row, base)
        points[row["sizes"]["rounds"]] = ratio or Ratio(row["seconds"]["median"] / base["seconds"]["median"])
    return points


def _draw_lines(ax: Axes, lines: dict[str, tuple[str, dict[int, Ratio]]]) -> None:
    """Each line in its provider's colour, several of one provider by their dashes, with its range at every point."""
    seen: list[str] = []
    for label, (provider, points) in lines.items():
        colour, marker = LOOKS.get(provider, OTHER_LOOK)
        dashes = ("-", "--", ":", "-.")[seen.count(provider) % 4]
        seen.append(provider)
        values = [ratio.value for ratio in points.values()]
        ax.plot(list(points), values, color=colour, marker=marker, linestyle=dashes, markersize=5, label=label)
        for x, ratio in points.items():
            if ratio.range is not None:
                ax.vlines(x, *ratio.range, color=colour, linewidth=1)
    ax.legend(frameon=False, fontsize=9, loc="upper left")


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
