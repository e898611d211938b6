"""The one style of the plots: colours of providers, panels, lines with their labels at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.document import Ratio
from benchmarks.units import plural
from graphmoe_model.presentation import MUTED, PALE

# Paul Tol's "muted" scheme, made for readers with any colour vision; shapes tell apart what colours might not.
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


def look(provider: str) -> tuple[str, str]:
    """Colour and marker, the same in every plot; grey crosses for a provider without its own."""
    return LOOKS.get(provider, (MUTED, "+"))


# Between labels, as a share of the height of a panel.
LABEL_GAP = 0.065


class Line(NamedTuple):
    """What one contender measured along a plot's x."""

    label: str
    provider: str
    x: list[float]
    y: list[Ratio]


def _traits(row: dict[str, Any]) -> dict[str, str]:
    """What distinguishes a row, as labels say it."""
    sizes, context = row["sizes"], row.get("context")
    return {
        **{"group": row["group"], "model": row["model"], "mode": row["mode"], "provider": row["provider"]},
        **{"tokens": plural(sizes["tokens"], "token"), "context": f"{context:,} cached" if context else ""},
        **{"experts": f"n={sizes['experts']}", "dtype": sizes["dtype"], "graph": "in a graph" if row["graph"] else ""},
    }


def rows_by(rows: Iterable[dict[str, Any]], *names: str) -> list[list[dict[str, Any]]]:
    """Rows that share the named traits together, in order of first appearance."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        traits = _traits(row)
        found.setdefault(tuple(traits[name] for name in names), []).append(row)
    return list(found.values())


def series_of(rows: Sequence[dict[str, Any]], along: str) -> tuple[str, list[tuple[str, list[dict[str, Any]]]]]:
    """A panel's title of the traits that all rows share, and its lines by the traits in which they differ."""
    traits = [{name: text for name, text in _traits(row).items() if name != along} for row in rows]
    varying = [name for name in traits[0] if name == "provider" or len({t[name] for t in traits}) > 1]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row, of_row in zip(rows, traits, strict=True):
        first = ["provider", *(name for name in varying if name != "provider")]
        lines.setdefault(", ".join(of_row[name] for name in first if of_row[name]), []).append(row)
    title = ", ".join(text for name, text in traits[0].items() if name not in varying and text)
    return title, list(lines.items())


def panel_grid(panels: Sequence[tuple[str, Sequence[Any]]]) -> tuple[Figure, list[Axes]]:
    """A grid of titled panels, two a line, tall enough for the labels of their lines."""
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height = max(3.4, 0.24 * max(len(content) for _, content in panels))
    figure = Figure(figsize=(7.5 * columns, 1.0 + height * lines), layout="constrained")  # not pyplot: no global state
    grid = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for ax, (title, _) in zip(grid, panels, strict=False):
        ax.set_title(title)
    for ax in grid[len(panels) :]:  # what is left of the last line
        ax.axis("off")
    return figure, grid[: len(panels)]


def draw_lines(ax: Axes, lines: Sequence[Line], more: Sequence[tuple[float, float, str, str]] = ()) -> None:
    """Each line in its provider's colour, several of one provider by their dashes, labelled at its end."""
    seen: list[str] = []
    ends = list(more)
    for line in lines:
        colour, marker = look(line.provider)
        dashes = ("-", "--", ":", "-.")[seen.count(line.provider) % 4]
        seen.append(line.provider)
        values = [y.value for y in line.y]
        ax.plot(line.x, values, color=colour, marker=marker, linestyle=dashes, linewidth=1.6, markersize=5)
        for x, y in zip(line.x, line.y, strict=True):
            if y.range is not None:
                ax.vlines(x, *y.range, color=colour, linewidth=1)
        ends.append((line.x[-1], values[-1], line.label, colour))
    _label(ax, ends)


def _label(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels to the right of the axes, in the order of the lines' ends and moved apart, each led to its line."""
    ax.autoscale_view()
    to_axes = ax.transScale + ax.transLimits  # of data, into fractions of the axes
    found = sorted((float(to_axes.transform((x, y))[1]), x, y, text, colour) for x, y, text, colour in ends)
    heights = _apart([at for at, *_ in found], min(LABEL_GAP, 1 / len(found)))
    for (_, x, y, text, colour), height in zip(found, heights, strict=True):
        arrow: Any = {"arrowstyle": "-", "color": PALE, "linewidth": 0.8, "relpos": (0, 0.5)}
        place: Any = {"xytext": (1.03, height), "textcoords": "axes fraction", "annotation_clip": False}
        ax.annotate(text, (x, y), va="center", color=colour, fontsize=9, arrowprops=arrow, **place)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved as little as leaves ``gap`` between neighbours: those too close spread around their mean."""
    blocks: list[tuple[float, int]] = []  # mean of the heights less their gaps, and how many they are
    for index, height in enumerate(heights):
        block = (height - index * gap, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, count = blocks.pop()
            block = ((mean * count + block[0] * block[1]) / (count + block[1]), count + block[1])
        blocks.append(block)
    means = [mean for mean, count in blocks for _ in range(count)]
    return [mean + index * gap for index, mean in enumerate(means)]
