"""The speed targets of the design beside what results found: every target has a row, measured or not."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from benchmarks.document import Ratio, Source, conditions_line, turn_ratio

Row = dict[str, Any]
HEADER = ("target", "wanted", "found", "verdict", "measured on")
MISSING = "not measured"
BOUNDS = {"<=": operator.le, ">=": operator.ge}


def times(content: dict[str, Any], over: Row, under: Row) -> Ratio | None:
    """The ratio of two times, turn by turn."""
    return turn_ratio(over, under)


def peaks(content: dict[str, Any], over: Row, under: Row) -> Ratio | None:
    """The ratio of two peaks of memory."""
    both = over.get("peak bytes"), under.get("peak bytes")
    return Ratio(both[0] / both[1]) if both[0] and both[1] else None


def further(content: dict[str, Any], over: Row, under: Row) -> Ratio | None:
    """The time of a further round as a share of T=1: half of what the ratio of T=3 to T=1 exceeds 1 by."""
    found = turn_ratio(over, under)
    if found is None or found.range is None:
        return None
    return Ratio((found.value - 1) / 2, ((found.range[0] - 1) / 2, (found.range[1] - 1) / 2))


def gru_share(content: dict[str, Any], over: Row, under: Row) -> Ratio | None:
    """The GRU kernels' share of the layer: each kind of step alone, over the layer at T=3, which has one of each."""
    wanted = {"kernel": "gru_forward", "tokens": over["sizes"]["tokens"], "experts": 8, "dtype": "bf16"}
    steps = [row for row in content["kernels"] if all(row.get(key) == value for key, value in wanted.items())]
    longest = {step["round"]: step["seconds"]["median"] for step in sorted(steps, key=lambda s: s["seconds"]["median"])}
    return Ratio(sum(longest.values()) / over["seconds"]["median"]) if len(longest) == 2 else None


class Target(NamedTuple):
    """A figure of two contenders of a case, and its bound; the worst of the cases counts.

    Attributes:
        wanted: the bound, which itself is kept.
        case: the case's name, in which ``*`` stands for anything.
        over, under: labels in the case.
        figure: what is made of the two rows.
        device: the kind of device whose results count.
        tokens: the fewest that count.
    """

    what: str
    wanted: str
    case: str
    over: str
    under: str
    figure: Callable[[dict[str, Any], Row, Row], Ratio | None] = times
    device: str = "cuda"
    tokens: int = 1

    def find(self, content: dict[str, Any]) -> tuple[Ratio, str] | None:
        """The figure in a result, and what to say of it; None where it was not measured."""
        found = list(self._figures(content))
        if not found:
            return None
        ratio, row = (min if self.wanted.startswith(">=") else max)(found, key=lambda each: each[0].value)
        worst = f", the worst of {len(found)}: {row['model']}, {row['sizes']['tokens']:,} tokens"
        return ratio, worst if len(found) > 1 else ""

    def met(self, value: float) -> bool:
        """Whether a figure keeps the bound; a rounding misses nothing."""
        sign, bound = self.wanted.split()
        return BOUNDS[sign](round(value, 9), float(bound))

    def _figures(self, content: dict[str, Any]) -> Iterator[tuple[Ratio, Row]]:
        rows = {(row["case"], row["label"]): row for row in content["rows"]}
        for case, label in rows:
            if label == self.over and fnmatchcase(case, self.case) and (case, self.under) in rows:
                over = rows[case, self.over]
                counts = over["sizes"]["tokens"] >= self.tokens and over["model"] != "tiny"
                ratio = self.figure(content, over, rows[case, self.under]) if counts else None
                if ratio is not None:
                    yield ratio, over


def _cpu_steps(
    model: str, *, over_one: str, literal: str, one_round: str | None = None, over_dense: str | None = None
) -> Iterator[Target]:
    """The bounds of a training step on a CPU with dropout, at 512 tokens and more."""
    case, one, three = f"step, {model}, training, * tokens, n=8, by rounds, fp32", "torch, T=1", "torch, T=3"
    for what, wanted, over, under in (
        ("T=1, over the dense MLP's", one_round, one, "dense"),
        ("T=3, over the dense MLP's", over_dense, three, "dense"),
        ("T=3, over T=1", over_one, three, one),
        ("T=3, times faster than the literal loop", literal, "literal, T=3", three),
    ):
        if wanted is not None:
            yield Target(f"CPU, training step, {model}, {what}", wanted, case, over, under, times, "cpu", 512)


def _cpu_layer(which: str, fewest: int = 1) -> tuple[str, str, str, Callable[..., Ratio | None], str, int]:
    """What a target about a layer's inference on a CPU has after its bound."""
    return f"layer, llama-3.2-1b, inference, {which}, n=8, fp32", "torch", "dense", times, "cpu", fewest


PREFILL = "layer, llama-3-8b, inference, 8192 tokens, T=3, n=8, bf16"
STEP = "layer, llama-3-8b, training, 8192 tokens, T=3, n=8, bf16, against torch.compile"
ROUTING = "routing, llama-3-8b, inference, first round, {} tokens, bf16"
PREFILL_OF_16 = "decoder, llama-3-8b, prefill, 8192 tokens, n=8, by rounds, bf16"
DECODE = "decoder, llama-3-8b, decode, context 2048, 1 tokens, n=8, by rounds, bf16"
DECODES = "decode, {}, T=3, in a CUDA graph, over the dense MLP in one"
SHARE = "each further round, share of a decoder layer at T=1, {}"
TARGETS = (
    Target("prefill, 8192 tokens, T=3, over the dense MLP", "<= 1.6", PREFILL, "triton", "dense"),
    Target(
        "same, times faster than the compiled literal loop",
        *(">= 2.0", f"{PREFILL}, against torch.compile", "literal_compiled", "triton"),
    ),
    Target("same, times faster than a peer's MixLoRA layer in T rounds", ">= 6.0", PREFILL, "peer_mixlora", "triton"),
    Target(DECODES.format("1 token"), "<= 1.7", PREFILL.replace("8192", "1"), "triton", "dense"),
    Target(DECODES.format("16 tokens"), "<= 1.7", PREFILL.replace("8192", "16"), "triton", "dense"),
    Target(SHARE.format("prefill of 16 x 512"), "<= 0.16", PREFILL_OF_16, "triton, T=3", "triton, T=1", further),
    Target(SHARE.format("decode with 2048 cached"), "<= 0.16", DECODE, "triton, T=3", "triton, T=1", further),
    Target(
        "training step, 8192 tokens, T=3, times faster than the compiled literal loop",
        ">= 1.7",
        STEP,
        "literal_compiled",
        "triton",
    ),
    Target("same, peak memory over the compiled literal loop's", "<= 0.4", STEP, "triton", "literal_compiled", peaks),
    Target(
        "share of the GRU kernels in the layer, prefill, 8192 tokens, T=3",
        "<= 0.03",
        PREFILL,
        "triton",
        "triton",
        gru_share,
    ),
    Target(
        "MixLoRA (T=1), prefill, 8192 tokens, over the dense MLP",
        "<= 1.15",
        PREFILL.replace("T=3", "T=1"),
        "triton",
        "dense",
    ),
    Target("routing, 1 token, times faster than PyTorch", ">= 4.0", ROUTING.format(1), "torch", "triton"),
    Target("routing, 16,384 tokens, times faster than PyTorch", ">= 4.0", ROUTING.format(16384), "torch", "triton"),
    Target(
        "CPU, fp32, 64 tokens and more, T=3, times faster than the literal loop",
        *(">= 1.7", "layer, *, inference, * tokens, T=3, n=8, fp32", "literal", "torch", times, "cpu", 64),
    ),
    Target(
        "same, T=1, over the literal loop (never slower, but for 5% of noise)",
        *("<= 1.05", "layer, *, inference, * tokens, T=1, n=8, fp32", "torch", "literal", times, "cpu", 64),
    ),
    *_cpu_steps("smollm2-135m", one_round="<= 1.8", over_dense="<= 4.2", over_one="<= 1.9", literal=">= 1.5"),
    *_cpu_steps("llama-3.2-1b", over_one="<= 1.8", literal=">= 1.6"),
    Target("CPU, inference, 64 tokens and more, T=3, over the dense MLP", "<= 1.5", *_cpu_layer("* tokens, T=3", 64)),
    Target("CPU, inference, 1 token, T=3, over the dense MLP", "<= 1.6", *_cpu_layer("1 tokens, T=3")),
    Target("CPU, inference, 64 tokens and more, T=1, over the dense MLP", "<= 1.05", *_cpu_layer("* tokens, T=1", 64)),
    Target("CPU, inference, 1 token, T=1, over the dense MLP", "<= 1.1", *_cpu_layer("1 tokens, T=1")),
    Target(
        "CPU, inference, 128 tokens and more, T=3, n = 64 over n = 8",
        *("<= 1.25", "scaling, llama-3.2-1b, inference, * tokens, T=3, by experts, fp32", "torch, n=64", "torch, n=8"),
        *(times, "cpu", 128),
    ),
)


def target_rows(sources: Sequence[Source]) -> list[list[str]]:
    """A row of `HEADER` for every target of the design, from the newest result of its kind of device that measured it.

    A result of an H200 goes before one of another GPU, whose figure is shown, and meets nothing: the verdict names it.
    """
    newest_first = sorted(sources, key=lambda s: s.content["conditions"]["date"], reverse=True)
    newest_first.sort(key=lambda s: not _is_h200(s.content))  # stable
    return [_target_row(target, [source.content for source in newest_first]) for target in TARGETS]


def _target_row(target: Target, contents: Sequence[dict[str, Any]]) -> list[str]:
    for content in contents:
        if content["conditions"]["device"]["kind"] == target.device and (found := target.find(content)) is not None:
            verdict = "met" if target.met(found[0].value) else "missed"
            if target.device == "cuda" and not _is_h200(content):
                name = content["conditions"]["device"]["name"].removeprefix("NVIDIA ")
                verdict = f"missed (on {name})" if verdict == "missed" else f"not measured on an H200 (kept on {name})"
            return [target.what, target.wanted, f"{found[0]}{found[1]}", verdict, conditions_line(content)]
    return [target.what, target.wanted, "-", MISSING, "-"]


def _is_h200(content: dict[str, Any]) -> bool:
    """A whole H200: a slice of one (MIG) has a part of its speed, and a GH200 is another device."""
    name = content["conditions"]["device"]["name"]
    return re.search(r"\bH200\b", name) is not None and "MIG" not in name
