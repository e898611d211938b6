"""The plots of one result, drawn with matplotlib and without a display; a provider keeps its colour in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator, NullFormatter, PercentFormatter

from benchmarks.document import WITHOUT_ROUNDS, Ratio, turn_ratio
from benchmarks.drawing import Line, draw_lines, look, panel_grid, rows_by, series_of
from benchmarks.targets import short_commit
from benchmarks.units import seconds
from graphmoe_model.presentation import BACKING, INK, MUTED, STYLE

# Parts of a profile as the paper's Fig 6 joins them.
SHARES = {
    "attention": (("attention",), "#332288"),
    "MLP, experts and routing": (("mlp", "experts", "routing"), "#44AA99"),
    "GRU": (("gru",), "#CC6677"),
    "other": (("other",), "#BBBBBB"),
}
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
    panels, inference = [], []
    for rows in rows_by([r for r in content["rows"] if r["group"] in ("rounds", "decoder")], "group", "model", "mode"):
        title, series = series_of(rows, "rounds")
        lines = [_relative(label, of_line) for label, of_line in series]
        if lines := [line for line in lines if len(line.x) > 1]:
            panels.append((title, lines))
            inference.append(rows[0]["mode"] != "training")
    if not panels:
        raise NoRows("no rows of the groups rounds and decoder with T=1 and another T")
    figure, axes = panel_grid(panels)
    for ax, (_, lines), with_paper in zip(axes, panels, inference, strict=True):
        rounds = sorted({x for line in lines for x in line.x})
        paper = [1 + PAPER_ROUND * (t - 1) for t in rounds]
        if with_paper:
            ax.plot(rounds, paper, color=MUTED, dashes=(4, 3), linewidth=1.2)
        draw_lines(ax, lines, [(rounds[-1], paper[-1], "paper: 1 + 0.16 (T - 1)", MUTED)] if with_paper else ())
        ax.set(xlabel="rounds T", ylabel="time over that of T=1")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _relative(label: str, rows: Sequence[dict[str, Any]]) -> Line:
    bases = [row for row in rows if row["sizes"]["rounds"] == 1]
    points = []
    for row in rows if bases else ():
        base = next((each for each in bases if each["case"] == row["case"]), bases[0])
        ratio = Ratio(1.0) if row is base else turn_ratio(row, base)
        ratio = ratio or Ratio(row["seconds"]["median"] / base["seconds"]["median"])
        points.append((row["sizes"]["rounds"], ratio))
    points.sort(key=lambda point: point[0])
    return Line(label, rows[0]["provider"], [x for x, _ in points], [y for _, y in points])


def latency_shares(content: dict[str, Any]) -> Figure:
    """Attention, MLP, GRU and the rest as shares of a model's time, by adapter and phase."""
    profiles = [p for p in content["profiles"] if p["phase"] != "host" and sum(p["seconds"].values()) > 0]
    if not profiles:
        raise NoRows("no profiles")
    panels: dict[str, list[dict[str, Any]]] = {}
    for profile in profiles:
        title = f"{profile['model']}, {profile['phase']}, {profile['tokens']:,} tokens"
        panels.setdefault(title, []).append(profile)
    figure, axes = panel_grid(list(panels.items()))
    for ax, bars in zip(axes, panels.values(), strict=True):
        left = [0.0] * len(bars)
        for name, (parts, colour) in SHARES.items():
            shares = [sum(b["seconds"].get(p, 0.0) for p in parts) / sum(b["seconds"].values()) for b in bars]
            drawn = ax.barh(range(len(bars)), shares, left=left, color=colour, label=name, height=0.6)
            texts = [f"{share:.0%}" if share > 0.04 else "" for share in shares]
            ink = "white" if name == "attention" else INK  # the only dark one
            ax.bar_label(drawn, texts, label_type="center", color=ink, fontsize=9)
            left = [start + share for start, share in zip(left, shares, strict=True)]
        for index, bar in enumerate(bars):
            whole, gru = sum(bar["seconds"].values()), bar["seconds"].get("gru", 0.0)
            note = seconds(whole) + (f", GRU {gru / whole:.1%}" if gru else "")
            ax.annotate(note, (1, index), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        ax.set_yticks(range(len(bars)), [bar["adapter"] for bar in bars])
        ax.set_xlim(0, 1)
        ax.invert_yaxis()
        ax.grid(False)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=len(SHARES))
    return figure


def time_over_tokens(content: dict[str, Any]) -> Figure:
    """The layer's time in inference against tokens, T=1 and T=3; what has no rounds is in both."""
    rows = [r for r in content["rows"] if (r["group"], r["mode"]) == ("layer", "inference")]
    panels = []
    for of_model in rows_by(rows, "model", "graph"):
        for rounds in (1, 3):
            cases = {r["case"] for r in of_model if _has_rounds(r, rounds)}
            shown = [r for r in of_model if _has_rounds(r, rounds) or _is_baseline(r, cases)]
            if len({r["sizes"]["tokens"] for r in shown}) > 1:
                title, series = series_of(shown, "tokens")
                lines = [_medians(label, each, lambda r: r["sizes"]["tokens"]) for label, each in series]
                panels.append((f"T={rounds}, {title}", lines))
    if not panels:
        raise NoRows("no rows of the layer in inference at more than one token count, T=1 or T=3")
    figure, axes = panel_grid(panels)
    for ax, (_, lines) in zip(axes, panels, strict=True):
        ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time")
        draw_lines(ax, lines)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(_LogSeconds())
        ax.yaxis.set_minor_formatter(_LogSeconds())
    return figure


class _LogSeconds(LogFormatter):
    """Times at the ticks of a logarithmic axis; between the decades where there is room, which the base class knows."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return seconds(x) if super().__call__(x, pos) else ""


def _has_rounds(row: dict[str, Any], rounds: int) -> bool:
    return row["provider"] not in WITHOUT_ROUNDS and row["sizes"]["rounds"] == rounds


def _is_baseline(row: dict[str, Any], cases: set[str]) -> bool:
    return row["provider"] in WITHOUT_ROUNDS and row["case"] in cases


def _medians(label: str, rows: Sequence[dict[str, Any]], x: Callable[[dict[str, Any]], float]) -> Line:
    ordered = sorted(rows, key=x)
    return Line(label, rows[0]["provider"], [x(r) for r in ordered], [Ratio(r["seconds"]["median"]) for r in ordered])


def memory_over_rounds(content: dict[str, Any]) -> Figure:
    """Peak memory of a training step against T; what has no rounds is a point at T=1."""
    rows = [r for r in content["rows"] if r["mode"] == "training" and r.get("peak bytes") is not None]
    panels = []
    for of_panel in rows_by([r for r in rows if r["group"] in ("layer", "rounds")], "group", "model"):
        title, series = series_of(of_panel, "rounds")
        lines = []
        for label, each in series:
            points = sorted((r["sizes"]["rounds"], r["peak bytes"] / 1e6) for r in each)
            lines.append(Line(label, each[0]["provider"], [x for x, _ in points], [Ratio(y) for _, y in points]))
        panels.append((title, lines))
    if not panels:
        raise NoRows("no rows of training with their peak memory")
    figure, axes = panel_grid(panels)
    for ax, (_, lines) in zip(axes, panels, strict=True):
        ax.set(xlabel="rounds T", ylabel="peak MB")
        ax.set_ylim(0, 1.05 * max(y.value for line in lines for y in line.y))
        draw_lines(ax, lines)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def roofline(content: dict[str, Any]) -> Figure:
    """Operations a second against operations a byte, a panel for each group, under the limits of the same run."""
    limits = content["limits"]
    if not {"copy bytes a second", "matrix operations a second"} <= limits.keys():
        raise NoRows("no measured limits")
    rows = [r for r in content["rows"] if (w := r.get("work")) and w["bytes"] and w["operations"]]
    other = [r for r in rows if r["sizes"]["dtype"] != limits.get("matrix dtype", r["sizes"]["dtype"])]
    rows = [r for r in rows if r not in other]
    if not rows:
        raise NoRows("no rows with bytes and operations in the dtype of the measured limits")
    copy, matrix = limits["copy bytes a second"], limits["matrix operations a second"]
    groups = {of_group[0]["group"]: of_group for of_group in rows_by(rows, "group")}
    figure, axes = panel_grid([(name, ()) for name in groups])
    intensity = [_intensity(r) for r in rows]
    ends = [min(*intensity, matrix / copy) / 2, matrix / copy, max(*intensity, matrix / copy) * 2]
    note: Any = {"textcoords": "offset points", "fontsize": 9, "color": INK, "bbox": BACKING}
    for ax, of_group in zip(axes, groups.values(), strict=True):
        ax.plot(ends, [min(x * copy, matrix) for x in ends], color=INK, linewidth=1.5)
        ax.annotate(f"{matrix / 1e12:,.3g} TFLOP/s", (ends[2], matrix), xytext=(0, 8), ha="right", **note)
        ax.annotate(f"{copy / 1e12:,.3g} TB/s", (ends[0], ends[0] * copy), xytext=(8, 0), va="top", **note)
        for row in of_group:
            colour, marker = look(row["provider"])
            reached = row["work"]["operations"] / row["seconds"]["median"]
            ax.plot(_intensity(row), reached, marker=marker, color=colour, markersize=6, fillstyle="none")
        ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    shown = dict.fromkeys(r["provider"] for r in rows)
    keys = [
        Line2D([], [], color=look(p)[0], marker=look(p)[1], fillstyle="none", linestyle="none", label=p) for p in shown
    ]
    figure.legend(handles=keys, frameon=False, loc="outside lower left", ncols=len(keys))
    return figure


def _intensity(row: dict[str, Any]) -> float:
    return row["work"]["operations"] / row["work"]["bytes"]


PLOTS: dict[Callable[[dict[str, Any]], Figure], str] = {
    latency_over_rounds: "Latency against T, relative to T=1",
    latency_shares: "Where the time of a model goes",
    time_over_tokens: "The layer's time against tokens",
    roofline: "Roofline: what is reached of the measured limits",
    memory_over_rounds: "Peak memory of a training step against T",
}
