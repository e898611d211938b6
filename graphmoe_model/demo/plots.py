"""The plots of the demo's report, drawn with matplotlib and without a display."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from graphmoe_model.demo.comparison import Comparison
from graphmoe_model.demo.results import DemoResults
from graphmoe_model.presentation import BACKING, BLUE, INK, MUTED, ORANGE, STYLE

CHANCE = 0.25  # four options a question


def draw_plots(results: DemoResults) -> dict[str, bytes]:
    """The plots as PNG files, by name: loss, accuracy, expert_load and latency; comparison if there was one."""
    plots: dict[str, Callable[[Figure], None]] = {
        "loss": partial(_loss, results),
        "accuracy": partial(_accuracy, results),
        "expert_load": partial(_expert_load, results),
        "latency": partial(_latency, results),
    }
    if results.comparison is not None:
        plots["comparison"] = partial(_comparison, results.comparison)
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, plot in plots.items():
            figure = Figure(figsize=(7, 3.5), layout="constrained")  # not pyplot: no window, no global state
            plot(figure)
            png = BytesIO()
            figure.savefig(png, format="png", dpi=200)
            drawn[name] = png.getvalue()
    return drawn


def _loss(results: DemoResults, figure: Figure) -> None:
    axes = figure.subplots()
    steps, losses = zip(*results.losses, strict=True)
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1, label="each logged step")
    axes.plot(steps, _smooth(losses), color=BLUE, linewidth=2, label="moving average")
    axes.set(title="Training loss", xlabel="step")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.legend(frameon=False, loc="upper right")


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average over a fortieth of the curve, without the pull of its start towards zero."""
    keep = 1 - 1 / max(2.0, len(values) / 40)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def _accuracy(results: DemoResults, figure: Figure) -> None:
    axes = figure.subplots()
    skills = list(results.accuracy_before)
    series = [("before", ORANGE, results.accuracy_before), ("after", BLUE, results.accuracy_after)]
    for side, (label, colour, accuracy) in zip((-1, 1), series, strict=True):
        positions = [index + side * 0.19 for index in range(len(skills))]
        bars = axes.bar(positions, [accuracy[skill] for skill in skills], 0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="{:.0%}", padding=2, fontsize=9, bbox=BACKING)
    axes.axhline(CHANCE, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    axes.set_xticks(range(len(skills)), [skill.replace("_", " ").replace(" ", "\n") for skill in skills])
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Right answers on held-out questions")
    chance, *pair = axes.get_legend_handles_labels()[0]
    figure.legend(handles=[*pair, chance], frameon=False, loc="outside lower center", ncols=3)


def _expert_load(results: DemoResults, figure: Figure) -> None:
    loads = {layer: load.tolist() for layer, load in results.expert_load.items()}
    columns = min(2, len(loads))
    rows = -(-len(loads) // columns)
    rounds = max(map(len, loads.values()))
    figure.set_size_inches(7, 0.6 + rows * (0.9 + 0.36 * rounds))
    figure.suptitle("Expert load: % of routed tokens, by round and expert", x=0.01, ha="left", fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    top = max(share for load in loads.values() for row in load for share in row)
    for panel, (layer, load) in zip(panels, loads.items(), strict=False):
        _heatmap(panel, layer, load, top)
    for panel in panels[len(loads) :]:  # what is left of the last row
        panel.axis("off")


def _heatmap(axes: Axes, layer: str, load: list[list[float]], top: float) -> None:
    colours = LinearSegmentedColormap.from_list("load", ["#f5f8fd", BLUE])
    axes.imshow(load, cmap=colours, vmin=0, vmax=top, aspect="auto")
    for t, row in enumerate(load):
        for expert, share in enumerate(row):
            ink = "white" if share > 0.6 * top else INK
            axes.text(expert, t, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=ink)
    axes.set_title(layer, fontsize=10, color=MUTED)
    axes.set_xticks(range(len(load[0])))
    axes.set_yticks(range(len(load)), [f"round {t}" for t in range(1, len(load) + 1)])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _latency(results: DemoResults, figure: Figure) -> None:
    axes = figure.subplots()
    rounds = [entry.rounds for entry in results.latency]
    literal = [entry.literal_ms for entry in results.latency]
    folded = [entry.folded_ms for entry in results.latency]
    for label, colour, times in (("literal", ORANGE, literal), ("folded", BLUE, folded)):
        axes.plot(rounds, times, color=colour, linewidth=2, marker="o", markersize=6, label=label)
        axes.annotate(
            label,
            (rounds[-1], times[-1]),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )
    for entry in results.latency:
        if entry.rounds > 1:
            ratio = f"{entry.literal_ms / entry.folded_ms:.1f}× as fast"
            point = (entry.rounds, entry.folded_ms)
            axes.annotate(ratio, point, xytext=(7, -13), textcoords="offset points", color=BLUE, fontsize=9)
    axes.set(title="One layer, median milliseconds", xlabel="rounds T")
    axes.set_ylim(bottom=0)
    axes.set_xlim(rounds[0] - 0.25, rounds[-1] + 0.55)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _comparison(comparison: Comparison, figure: Figure) -> None:
    methods = comparison.methods
    figure.set_size_inches(7, 1.2 + 0.28 * len(methods))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(methods))
    colours = [BLUE if method.title.startswith("GraphMoE") else ORANGE for method in methods]
    series = [
        (left, f"Right answers after {comparison.steps:,} steps", [method.accuracy for method in methods], "{:.0%}"),
        (right, "Training step, median milliseconds", [method.step_ms for method in methods], "{:.0f}"),
    ]
    for axes, title, values, form in series:
        axes.bar_label(axes.barh(places, values, 0.7, color=colours), fmt=form, padding=3, fontsize=9, bbox=BACKING)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.margins(x=0.12, y=0.02)
    left.set_yticks(places, [method.title for method in methods])
    left.invert_yaxis()  # the first method on top; the right panel shares the axis
    left.axvline(comparison.base_accuracy, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="base model")
    left.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(frameon=False, loc="outside lower center")
