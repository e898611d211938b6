"""A sweep as a picture: accuracy and time against what was changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graphmoe_model.analysis.plots import SERIES, add_conditions
from graphmoe_model.analysis.sweep import BASE, Series
from graphmoe_model.analysis.sweep_report import SettingResult
from graphmoe_model.pictures import write_picture
from graphmoe_model.presentation import INK, STYLE


def draw_sweep(
    title: str, results: Sequence[SettingResult], series: Sequence[Series], conditions: str, path: Path
) -> list[str]:
    """Write the picture: accuracy above, seconds of a training step below, a column for each axis.

    Accuracy is the mean over tasks and seeds, bars are its 95% interval over seeds, as far as accuracies go; the base
    model is the dashed line.
    """
    by_name = {own.setting: own for own in results}
    columns = list(dict.fromkeys(own.axis for own in series))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 3.6 * len(columns), 4.8), layout="constrained")
        panels = figure.subplots(2, len(columns), squeeze=False, sharex="col", sharey="row")
        for column, axis in enumerate(columns):
            lines = [own for own in series if own.axis == axis]
            for i, line in enumerate(lines):
                label = line.title if len(lines) > 1 else None
                _line(panels[0, column], panels[1, column], line, by_name, SERIES[i % len(SERIES)], label)
            base = by_name.get(BASE)
            if base is not None and base.average is not None:
                level, dashes = 100 * base.average.mean, (0, (4, 3))
                panels[0, column].axhline(level, color=INK, linewidth=1, linestyle=dashes, label="the base model")
            panels[1, column].set_xlabel(axis)
            if panels[0, column].get_legend_handles_labels()[1]:
                panels[0, column].legend(
                    frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2
                )
        panels[1, 0].set_ylim(0, 1.1 * panels[1, 0].get_ylim()[1])
        panels[0, 0].set_ylabel("right answers, %")
        panels[1, 0].set_ylabel("training step, s")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        add_conditions(figure, conditions)
        return write_picture(figure, path)


def _line(
    accuracy: Axes, time: Axes, line: Series, results: dict[str, SettingResult], colour: str, label: str | None
) -> None:
    points = {x: results[name] for x, name in sorted(line.points.items()) if results[name].average is not None}
    places = list(points)
    averages = [own.average for own in points.values() if own.average is not None]
    means = [100 * own.mean for own in averages]
    halves = [100 * (own.half or 0.0) for own in averages]
    below = [min(half, mean) for half, mean in zip(halves, means, strict=True)]  # an interval may pass both ends
    above = [min(half, 100 - mean) for half, mean in zip(halves, means, strict=True)]
    accuracy.errorbar(
        places,
        means,
        [below, above],
        color=colour,
        marker="o",
        capsize=3,
        label=label,
    )
    seconds = [float("nan") if own.step_seconds is None else own.step_seconds for own in points.values()]
    time.plot(places, seconds, color=colour, marker="o")
    if all(place == int(place) for place in places):
        time.set_xticks(places, [str(int(place)) for place in places])
