"""Latency and its composition as pictures (GraphMoE, Fig. 5c and Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from graphmoe_model.analysis.plots import SERIES, add_conditions
from graphmoe_model.analysis.timings import LayerTime, ModelTime, Timings
from graphmoe_model.pictures import write_picture
from graphmoe_model.presentation import INK, short_model
from graphmoe_model.presentation import STYLE as BASE_STYLE
from graphmoe_model.profiling.plot import COLOURS
from graphmoe_model.profiling.result import CATEGORIES, TITLES

STYLE = {**BASE_STYLE, "legend.frameon": False, "legend.fontsize": 8}
MARKERS = "osD^vPX*"
LABELLED = 0.06  # the smallest share whose figure fits into its bar
AXES = {"decode": "tokens in the cache", "prefill": "tokens"}


def draw_latency(found: Sequence[Timings], path: Path) -> list[str]:
    """Write the picture of Fig. 5c: milliseconds of a decoded token and of a prefill against the length, by adapter,
    and of a layer against T; a row for each file, in it a panel for each model."""
    rows = [_panels(own, f", {own.device}" if len(found) > 1 else "") for own in found]
    columns = max(map(len, rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 4.2 * columns, 0.6 + 4.2 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), columns, squeeze=False)
        for axes_row, row in zip(panels, rows, strict=True):
            told: set[str] = set()  # what the legend to the left says already
            for axes, panel in zip(axes_row, row, strict=False):
                _panel(axes, *panel)
                handles, labels = axes.get_legend_handles_labels()
                if set(labels) != told:
                    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
                told = set(labels)
            for axes in axes_row[len(row) :]:
                axes.axis("off")
        figure.suptitle("Latency", x=0.01, ha="left", fontsize=11)
        add_conditions(figure, _measured(found))
        return write_picture(figure, path)


def draw_composition(found: Sequence[Timings], path: Path) -> list[str]:
    """Write the picture of Fig. 6: shares of attention, MLP, experts, routing and GRU, a bar for each adapter."""
    panels = [(own, *place, models) for own in found for place, models in own.by_phase().items()]
    bars = max(len(models) for *_, models in panels)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 4.6 * len(panels), 1.7 + 0.36 * bars), layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (own, model, phase, models) in zip(row, panels, strict=True):
            _composition(axes, models)
            device = f", {own.device}" if len(found) > 1 else ""
            length = f"{models[0].tokens:,} {AXES[phase]}"
            what = f"decode of one token, {length}" if phase == "decode" else f"prefill of {length}"
            axes.set_title(f"{_short_names(own)[model]}{device}\n{what}", fontsize=9)
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(CATEGORIES), frameon=False)
        figure.suptitle("Where the time of a forward goes", x=0.01, ha="left", fontsize=11)
        add_conditions(figure, _measured(found))
        return write_picture(figure, path)


Lines = dict[str, list[tuple[float, float]]]  # label -> (place, seconds)


def _measured(found: Sequence[Timings]) -> str:
    return "\n".join(dict.fromkeys(own.measured() for own in found))


def _panels(own: Timings, device: str) -> list[tuple[str, str, Lines, dict[str, float]]]:
    """Title, axis, lines, and times that hang on nothing, of each panel of a file."""
    found: list[tuple[str, str, Lines, dict[str, float]]] = []
    for (model, phase), models in own.by_phase().items():
        title = f"{_short_names(own)[model]}{device}\n" + ("one token of decode" if phase == "decode" else "prefill")
        found.append((title, AXES[phase], _by_adapter(models), {}))
    for case in dict.fromkeys(each.case for each in own.layers):
        layers = [each for each in own.layers if each.case == case]
        level = {each.provider: each.seconds for each in layers if each.rounds is None}
        found.append((f"layer{device}\n{case}", "rounds T", _by_provider(layers), level))
    return found


def _short_names(own: Timings) -> dict[str, str]:
    """What panels call the models of a file: their short names, where those differ, and how much of them was timed."""
    short = {model: short_model(model) for model in own.by_model()}
    names = short if len(set(short.values())) == len(short) else {model: model for model in short}
    layers = f", {own.conditions['layers']} layers" if "layers" in own.conditions else ""
    return {model: f"{name}{layers}" for model, name in names.items()}


def _by_adapter(models: Sequence[ModelTime]) -> Lines:
    lines: Lines = {}
    for each in models:
        assert each.seconds is not None  # `with_times`
        lines.setdefault("no adapter" if each.adapter == "none" else each.adapter, []).append(
            (each.tokens, each.seconds)
        )
    return lines


def _by_provider(layers: Sequence[LayerTime]) -> Lines:
    lines: Lines = {}
    for each in layers:
        if each.rounds is not None:
            lines.setdefault(each.provider, []).append((each.rounds, each.seconds))
    return lines


def _panel(axes: Axes, title: str, axis: str, lines: Lines, levels: dict[str, float]) -> None:
    for i, (label, points) in enumerate(lines.items()):
        places, seconds = zip(*sorted(points), strict=True)
        colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        times = [1e3 * value for value in seconds]
        axes.plot(places, times, label=label, color=colour, marker=marker, markersize=5)
    for name, level in levels.items():
        axes.axhline(1e3 * level, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=name)
    axes.set_title(title, fontsize=9)
    axes.set(xlabel=axis, ylabel="ms")
    if axis == "rounds T":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({place for points in lines.values() for place, _ in points}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:,.0f}"))
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def _composition(axes: Axes, models: Sequence[ModelTime]) -> None:
    left = [0.0] * len(models)
    for category in CATEGORIES:
        shares = [each.shares[category] for each in models]
        bars = axes.barh(range(len(models)), shares, 0.8, left, color=COLOURS[category], label=TITLES[category])
        figures = [f"{share:.0%}" if share >= LABELLED else "" for share in shares]
        ink = "white" if category in ("attention", "routing", "gru") else INK
        axes.bar_label(bars, figures, label_type="center", color=ink, fontsize=8)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(models)), ["no adapter" if each.adapter == "none" else each.adapter for each in models])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
