"""The analyses of a trained adapter as pictures that one would put into a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from graphmoe_model.analysis.balance import TaskBalance
from graphmoe_model.analysis.trace import RouterTrace, Trace
from graphmoe_model.pictures import write_picture
from graphmoe_model.presentation import BLUE, INK, MUTED, ORANGE, PALE, STYLE

# Adapters in a plot of bars, and experts in a trace: distinguishable in every common form of colour blindness.
SERIES = (BLUE, ORANGE, "#2a9d6f", "#8a5a2b", "#b03a78", "#6b7785", "#c9a227", "#1f8a99")
EXPERTS = ("#9ec1f7", "#f2b880", "#a9dbc2", "#e6b3d1", "#f4e08a", "#c9b59f", "#b9e3ea", "#d0c4ee")
HIGHEST = 24.0  # inches of a heat map; beyond it rows become thinner
TOKENS = 56  # of a text in one picture; more could not be read
NUMBERED = 8  # experts of a router in a heat map; more have no room for numbers


def draw_balance(found: Sequence[TaskBalance], conditions: str, path: Path) -> list[str]:
    """Write the picture of Fig. 4: each task's deviation of the experts' shares, by adapter and round."""
    adapters, tasks = _names(found)
    bars = [
        (adapter, i) for adapter in adapters for i in range(max(len(b.rounds) for b in found if b.adapter == adapter))
    ]
    by = {(b.adapter, b.task): b for b in found}
    width = 0.8 / len(bars)
    wide = max(6.5, 1.0 + 0.32 * len(bars) * len(tasks))
    entry = 0.6 + 0.07 * max(len(_bar(*bar, by, tasks)) for bar in bars)  # inches of an entry of the legend
    columns = max(1, min(len(bars), int((wide - 0.6) / entry)))
    with matplotlib.rc_context(STYLE):
        size = (wide, 3.4 + 0.2 * -(-len(bars) // columns))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for place, (adapter, i) in enumerate(bars):
            heights = [100 * by[adapter, task].rounds[i].deviation for task in tasks]
            at = [index + (place - (len(bars) - 1) / 2) * width for index in range(len(tasks))]
            colour = _shade(SERIES[adapters.index(adapter) % len(SERIES)], i, len(by[adapter, tasks[0]].rounds))
            axes.bar(at, heights, 0.9 * width, color=colour, label=_bar(adapter, i, by, tasks))
        tight = 0.1 * max(map(len, tasks)) * len(tasks) > size[0] - 1
        axes.set_xticks(range(len(tasks)), tasks, rotation=30 if tight else 0, ha="right" if tight else "center")
        axes.set_ylabel("percentage points")
        figure.suptitle("Load of the experts: standard deviation of their shares", x=0.01, ha="left", fontsize=11)
        below = -0.28 if tight else -0.1
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, below), ncols=columns)
        add_conditions(figure, conditions)
        return write_picture(figure, path)


def draw_balance_map(found: Sequence[TaskBalance], conditions: str, path: Path) -> list[str]:
    """Write the picture of every expert's share, a mean over tasks: routers in rows, rounds and experts in columns.

    Colours are shares over 1/n, so that layers and adapters with other n compare. Up to 8 experts are numbered, and
    their shares written into their fields in percent.
    """
    adapters, tasks = _names(found)
    maps = [_share_map([b for b in found if b.adapter == adapter]) for adapter in adapters]
    relative = [shares * _experts(shares, rounds)[:, None] for shares, _, rounds in maps]
    top = max(float(np.nanmax(own)) for own in relative)
    rows = max(own.shape[0] for own, _, _ in maps)
    widths = [own.shape[1] for own, _, _ in maps]
    colours = LinearSegmentedColormap.from_list("load", ["#f5f8fd", BLUE]).with_extremes(bad=PALE)
    with matplotlib.rc_context(STYLE):
        inches = [
            max(1.6, 0.3 * width, 0.09 * max(map(len, _lines(adapter))))
            for width, adapter in zip(widths, adapters, strict=True)
        ]
        figure = Figure(figsize=(1.8 + sum(inches), min(HIGHEST, 2.0 + 0.2 * rows)), layout="constrained")
        panels = figure.subplots(1, len(adapters), squeeze=False, width_ratios=inches)[0]
        for panel, adapter, (shares, names, rounds), own in zip(panels, adapters, maps, relative, strict=True):
            image = panel.imshow(own, cmap=colours, vmin=0, vmax=top, aspect="auto")
            _label_map(panel, adapter, names, rounds, shares, own > 0.6 * top)
        label = "load over that of even shares, 1/n"
        figure.colorbar(image, ax=panels.tolist(), label=label, shrink=0.6).outline.set_visible(False)
        if any(shares.shape[1] // rounds <= NUMBERED for shares, _, rounds in maps):
            conditions = f"columns are experts, numbers their shares of a round's load in %\n{conditions}"
        over = "" if len(tasks) == 1 else f", a mean over {len(tasks)} tasks"
        figure.suptitle(f"Load of each expert{over}", x=0.01, ha="left", fontsize=11)
        add_conditions(figure, conditions)
        return write_picture(figure, path)


def draw_trace(trace: Trace, routers: Sequence[str], conditions: str, path: Path) -> list[str]:
    """Write the picture of a text's way: a panel for each router, tokens in columns, rounds in rows, experts by colour.

    The number is the expert with the largest probability, the smaller ones those that were chosen beside it. Of more
    than `TOKENS` tokens the first are shown.
    """
    tokens = [_visible(token) for token in trace.tokens[:TOKENS]]
    rounds = len(trace.routers[routers[0]].experts)
    with matplotlib.rc_context(STYLE):
        height = 1.4 + len(routers) * (0.5 + 0.34 * rounds) + 0.09 * max(map(len, tokens))
        figure = Figure(figsize=(1.3 + 0.3 * max(16, len(tokens)), height), layout="constrained")
        panels = figure.subplots(len(routers), 1, squeeze=False, sharex=True)[:, 0]
        for panel, name in zip(panels, routers, strict=True):
            _trace_panel(panel, trace.routers[name], len(tokens))
            panel.set_title(name, fontsize=9)
        panels[-1].set_xticks(range(len(tokens)), tokens, rotation=90, fontfamily="monospace", fontsize=8)
        figure.suptitle("Experts that each token visits", x=0.01, ha="left", fontsize=11)
        own = trace.overall
        measured = f"specialisation by round, all routers and {trace.texts:,} texts: {own.information:.4f}"
        add_conditions(figure, f"{measured} (95% by chance below {own.null_95:.2g}, p = {own.p:.3f})\n{conditions}")
        return write_picture(figure, path)


def _trace_panel(axes: Axes, router: RouterTrace, tokens: int) -> None:
    colours = [to_rgb(EXPERTS[expert % len(EXPERTS)]) for expert in range(router.num_experts)]
    axes.imshow([[colours[own[0]] for own in round_[:tokens]] for round_ in router.experts], aspect="auto")
    dense = len(router.experts[0][0]) == router.num_experts
    for t, round_ in enumerate(router.experts):
        for i, own in enumerate(round_[:tokens]):
            axes.text(i, t, str(own[0]), ha="center", va="center" if dense or len(own) == 1 else "bottom", fontsize=8)
            if not dense and len(own) > 1:
                axes.text(i, t, " ".join(map(str, own[1:])), ha="center", va="top", fontsize=6, color=INK)
    for t in range(1, len(router.experts)):
        axes.axhline(t - 0.5, color="white", linewidth=2)
    axes.set_yticks(range(len(router.experts)), [f"round {t + 1}" for t in range(len(router.experts))])
    axes.set_xticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _share_map(found: Sequence[TaskBalance]) -> tuple[np.ndarray, list[str], int]:
    """Shares [routers, T * n] as a mean over tasks, NaN where a router has fewer experts; the routers; T."""
    names = list(found[0].shares)
    rounds, most = len(found[0].rounds), max(len(own[0]) for own in found[0].shares.values())
    shares = np.full((len(names), rounds, most), np.nan)
    for i, name in enumerate(names):
        mean = np.mean([own.shares[name] for own in found], axis=0)  # [T, n]
        shares[i, : mean.shape[0], : mean.shape[1]] = mean  # attention's routers have one round
    return shares.reshape(len(names), rounds * most), names, rounds


def _experts(shares: np.ndarray, rounds: int) -> np.ndarray:
    """n of each router [routers] of shares [routers, T * n]."""
    return np.sum(~np.isnan(shares[:, : shares.shape[1] // rounds]), axis=1)


def _label_map(
    axes: Axes, adapter: str, names: Sequence[str], rounds: int, shares: np.ndarray, dark: np.ndarray
) -> None:
    experts = shares.shape[1] // rounds
    axes.set_title("\n".join(_lines(adapter)), fontsize=9)
    middles = [t * experts + (experts - 1) / 2 for t in range(rounds)]
    below = "\n" if experts <= NUMBERED else ""
    axes.set_xticks(middles, [f"{below}round {t + 1}" for t in range(rounds)])
    if experts <= NUMBERED:
        axes.set_xticks(range(shares.shape[1]), [str(i % experts) for i in range(shares.shape[1])], minor=True)
        axes.tick_params(axis="x", which="minor", labelsize=7)
        for (i, j), share in np.ndenumerate(shares):
            if not np.isnan(share):
                ink = "white" if dark[i, j] else INK
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=ink)
    for t in range(1, rounds):
        axes.axvline(t * experts - 0.5, color="white", linewidth=3)
    step = max(1, len(names) // 40)
    axes.set_yticks(range(0, len(names), step), [_short(name) for name in names[::step]], fontsize=7)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _bar(adapter: str, i: int, by: Mapping[tuple[str, str], TaskBalance], tasks: Sequence[str]) -> str:
    """What the legend calls an adapter's round."""
    return adapter if len(by[adapter, tasks[0]].rounds) == 1 else f"{adapter}, round {i + 1}"


def _lines(adapter: str) -> list[str]:
    """An adapter's title with its folder, where it has one, on a line of its own."""
    return adapter.split(", ")


def _names(found: Sequence[TaskBalance]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(b.adapter for b in found)), list(dict.fromkeys(b.task for b in found))


def _shade(colour: str, i: int, count: int) -> tuple[float, ...]:
    """The colour of round i: the first is lightest, the last is the colour itself."""
    weight = 1.0 if count == 1 else 0.4 + 0.6 * i / (count - 1)
    return tuple(1 - weight * (1 - part) for part in to_rgb(colour))


def _short(name: str) -> str:
    """A router's name without what all of them have: ``model.layers.3.mlp`` is ``3.mlp``."""
    return name.rpartition("layers.")[2]


def _visible(token: str) -> str:
    """A token with its blanks to be seen, no sign that starts a formula, and signs that the font lacks by number."""
    font = get_font(findfont("monospace"))
    shown = token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
    shown = "".join(sign if font.get_char_index(ord(sign)) else f"<{ord(sign):X}>" for sign in shown)
    return shown.replace("$", r"\$") or "∅"


def add_conditions(figure: Figure, conditions: str) -> None:
    """Write under a picture what it was measured with."""
    figure.supxlabel(conditions, x=0.01, ha="left", fontsize=7, color=MUTED, wrap=True)
    figure.patch.set_facecolor("white")
    figure.set_edgecolor(INK)
