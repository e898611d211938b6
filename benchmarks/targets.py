"""The speed targets of the design beside what results found: every target has a row, measured or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.document import Ratio, Source, turn_ratio

MISSING, PEAK = "not measured", "peak bytes"
ELSEWHERE = "not measured on an H200"
# The sizes that the targets are about: the paper's.
PAPER = {"experts": 8, "top_k": 2, "rank": 16}
GPU_MODEL = "llama-3-8b"
CPU_MODELS = ("llama-3.2-1b", "qwen3-4b", "llama-3-8b")
# Ratios that differ by less are the same: a target that is met exactly must not be missed by a rounding.
ROUNDING = 1e-9


class TargetRow(NamedTuple):
    """A target as the table shows it; `HEADER` names its columns."""

    what: str
    wanted: str
    found: str
    verdict: str
    conditions: str


HEADER = ("target", "wanted", "found", "verdict", "measured on")


class Bound(NamedTuple):
    """The most or the least that a figure may be."""

    figure: float
    least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.least else '<='} {self.figure}"

    def met(self, value: float) -> bool:
        """Whether a figure keeps the bound, which itself is kept."""
        return value >= self.figure - ROUNDING if self.least else value <= self.figure + ROUNDING


class Target(NamedTuple):
    """One provider's figure over another's, in cases of one kind; the worst of the cases counts.

    Attributes:
        over, under: (provider, T), T None for what has no rounds.
        group, mode, graph, round, context: as in the rows; ``graph`` None where either will do.
        tokens: how many; with ``or_more`` also every larger count that was measured.
        figure: "seconds", "peak bytes", or "further": the time of a further round as a share, which is half of what the
            ratio of T=3 to T=1 exceeds 1 by.
        device: the kind of device whose results count.
    """

    what: str
    bound: Bound
    over: tuple[str, int | None]
    under: tuple[str, int | None]
    group: str = "layer"
    mode: str = "inference"
    figure: str = "seconds"
    tokens: int = 8192
    or_more: bool = False
    graph: bool | None = False
    round: str | None = None
    context: int | None = None
    device: str = "cuda"

    def find(self, content: dict[str, Any]) -> tuple[Ratio, str] | None:
        """The figure in a result, and what to say of it; None where it was not measured."""
        found = list(_figures(self, [row for row in content["rows"] if _fits(self, row)]))
        if not found:
            return None
        ratio, row = (min if self.bound.least else max)(found, key=lambda each: each[0].value)
        note = " (of medians)" if self.figure != PEAK and ratio.range is None else ""
        if len(found) > 1:
            note += f", the worst of {len(found)}: {row['model']}, {row['sizes']['tokens']:,} tokens"
        return ratio, note


class GruShare(NamedTuple):
    """The GRU kernels' share of the layer: each kind of step alone, over the layer at T=3, which has one of each."""

    what: str = "share of the GRU kernels in the layer, prefill, 8192 tokens, T=3"
    bound: Bound = Bound(0.03)
    device: str = "cuda"

    def find(self, content: dict[str, Any]) -> tuple[Ratio, str] | None:
        """The share in a result, and that it is one of medians; None where a part of it was not measured."""
        layer = [row for row in content["rows"] if _fits(PREFILL, row) and _is(TRITON, row)]
        first, later = (_gru_seconds(content["kernels"], name) for name in ("first", "later"))
        if not layer or first is None or later is None:
            return None
        return Ratio((first + later) / min(row["seconds"]["median"] for row in layer)), " (of medians)"


def least(figure: float) -> Bound:
    """At least."""
    return Bound(figure, least=True)


TRITON, DENSE, COMPILED, ONE_ROUND = ("triton", 3), ("dense", None), ("literal_compiled", 3), ("triton", 1)
PREFILL = Target("prefill, 8192 tokens, T=3, over the dense MLP", Bound(1.6), TRITON, DENSE)
DECODE = "decode, {}, T=3, in a CUDA graph, over the dense MLP in one"
SHARE = "each further round, share of a decoder layer at T=1, {}"
STEP = "training step, 8192 tokens, T=3, times faster than the compiled literal loop"
FOLDED = "CPU, fp32, 64 tokens and more, T=3, times faster than the literal loop"
NOT_SLOWER = "same, T=1, over the literal loop (never slower, but for 5% of noise)"
FURTHER: dict[str, Any] = {"over": TRITON, "under": ONE_ROUND, "group": "decoder", "figure": "further"}
ROUTING: dict[str, Any] = {"over": ("torch", None), "under": ("triton", None), "group": "routing", "round": "first"}
CPU: dict[str, Any] = {"tokens": 64, "or_more": True, "device": "cpu"}
TARGETS: tuple[Target | GruShare, ...] = (
    PREFILL,
    Target("same, times faster than the compiled literal loop", least(2.0), COMPILED, TRITON),
    Target("same, times faster than a peer's MixLoRA layer in T rounds", least(6.0), ("peer_mixlora", 3), TRITON),
    Target(DECODE.format("1 token"), Bound(1.7), TRITON, DENSE, tokens=1, graph=True),
    Target(DECODE.format("16 tokens"), Bound(1.7), TRITON, DENSE, tokens=16, graph=True),
    Target(SHARE.format("prefill of 16 x 512"), Bound(0.16), mode="prefill", **FURTHER),
    Target(
        SHARE.format("decode with 2048 cached"),
        Bound(0.16),
        mode="decode",
        tokens=1,
        graph=True,
        context=2048,
        **FURTHER,
    ),
    Target(STEP, least(1.7), COMPILED, TRITON, mode="training"),
    Target(
        "same, peak memory over the compiled literal loop's", Bound(0.4), TRITON, COMPILED, "layer", "training", PEAK
    ),
    GruShare(),
    Target("MixLoRA (T=1), prefill, 8192 tokens, over the dense MLP", Bound(1.15), ONE_ROUND, DENSE),
    Target("routing, 1 token, times faster than PyTorch", least(4.0), **ROUTING, tokens=1, graph=None),
    Target("routing, 16,384 tokens, times faster than PyTorch", least(4.0), **ROUTING, tokens=16384, graph=None),
    Target(FOLDED, least(1.7), ("literal", 3), ("torch", 3), **CPU),
    Target(NOT_SLOWER, Bound(1.05), ("torch", 1), ("literal", 1), **CPU),
)


def target_rows(sources: Sequence[Source]) -> list[TargetRow]:
    """A row for every target of the design, from the newest result of its kind of device that measured it.

    A result of an H200 goes before one of another GPU, whose figure is shown but meets or misses nothing.
    """
    newest_first = sorted(sources, key=lambda s: s.content["conditions"]["date"], reverse=True)
    newest_first.sort(key=lambda s: not _is_h200(s.content))  # stable
    return [_target_row(target, [source.content for source in newest_first]) for target in TARGETS]


def _target_row(target: Target | GruShare, contents: Sequence[dict[str, Any]]) -> TargetRow:
    for content in contents:
        if _kind(content) == target.device and (found := target.find(content)) is not None:
            ratio, note = found
            verdict = "met" if target.bound.met(ratio.value) else "missed"
            if target.device == "cuda" and not _is_h200(content):
                verdict = ELSEWHERE
            return TargetRow(target.what, str(target.bound), f"{ratio}{note}", verdict, conditions_line(content))
    return TargetRow(target.what, str(target.bound), "-", MISSING, "-")


def conditions_line(content: dict[str, Any]) -> str:
    """Device, commit and day of a result."""
    c = content["conditions"]
    return f"{c['device']['name']}, {short_commit(c['commit'])}, {c['date'][:10]}"


def short_commit(commit: str) -> str:
    """Ten digits, and the mark of a tree that differed."""
    return commit[:10] + "+" * (len(commit) > 10 and commit.endswith("+"))


def _kind(content: dict[str, Any]) -> str:
    return content["conditions"]["device"]["kind"]


def _is_h200(content: dict[str, Any]) -> bool:
    """A whole H200: a slice of one (MIG) has a part of its speed, and a GH200 is another device."""
    name = content["conditions"]["device"]["name"]
    return _kind(content) == "cuda" and re.search(r"\bH200\b", name) is not None and "MIG" not in name


def _fits(target: Target, row: dict[str, Any]) -> bool:
    sizes, models = row["sizes"], (GPU_MODEL,) if target.device == "cuda" else CPU_MODELS
    return (
        (row["group"], row["mode"]) == (target.group, target.mode)
        and row["model"] in models
        and sizes["dtype"] == ("bf16" if target.device == "cuda" else "fp32")
        and all(sizes[name] == value for name, value in PAPER.items())
        and (sizes["tokens"] == target.tokens or (target.or_more and sizes["tokens"] > target.tokens))
        and target.graph in (None, row["graph"])
        and target.round in (None, row.get("round"))
        and target.context in (None, row.get("context"))
    )


def _figures(target: Target, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[Ratio, dict[str, Any]]]:
    """The ratio at each model, token count and way of calling; of two cases only where no one case has both rows."""
    points: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        points.setdefault((row["model"], row["sizes"]["tokens"], row["graph"]), []).append(row)
    for at_point in points.values():
        over = [row for row in at_point if _is(target.over, row)]
        under = [row for row in at_point if _is(target.under, row)]
        pairs = [(o, u) for o in over for u in under]
        together = [(o, u) for o, u in pairs if o["case"] == u["case"]]
        for o, u in together or pairs:
            if (ratio := _ratio(target, o, u)) is not None:
                yield ratio, o


def _is(contender: tuple[str, int | None], row: dict[str, Any]) -> bool:
    provider, rounds = contender
    return row["provider"] == provider and rounds in (None, row["sizes"]["rounds"])


def _ratio(target: Target, over: dict[str, Any], under: dict[str, Any]) -> Ratio | None:
    if target.figure == PEAK:
        peaks = over.get(PEAK), under.get(PEAK)
        return None if peaks[0] is None or not peaks[1] else Ratio(peaks[0] / peaks[1])
    ratio = turn_ratio(over, under) or Ratio(over["seconds"]["median"] / under["seconds"]["median"])
    if target.figure != "further":
        return ratio
    low, high = ratio.range or (0.0, 0.0)
    return Ratio((ratio.value - 1) / 2, None if ratio.range is None else ((low - 1) / 2, (high - 1) / 2))


def _gru_seconds(kernels: Sequence[dict[str, Any]], name: str) -> float | None:
    wanted = {"kernel": "gru_forward", "tokens": 8192, "round": name, "experts": PAPER["experts"], "dtype": "bf16"}
    times = [row["seconds"]["median"] for row in kernels if all(row.get(k) == v for k, v in wanted.items())]
    return max(times, default=None)
