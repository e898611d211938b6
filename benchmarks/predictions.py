"""What kernels and the layer should take on an H200, by arithmetic, to be put beside what was measured.

A kernel's time is the largest of its limits and a launch; PREDICTIONS.md has the figures as they were before any of the
kernels had run, and says what they leave out. ``python -m benchmarks.predictions`` prints those of today's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.limits import H200
from benchmarks.units import seconds
from benchmarks.work import KERNELS, Work, kernel_work
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import SKINNY_TOKENS
from graphmoe_kernels.rethinking.weights import padded
from graphmoe_model.presentation import markdown_table

LLAMA_8B = Sizes(4096, 14336, 409, dtype="bf16")
MODEL = "llama-3-8b"
TOKENS = (1, 16, 64, 2048, 8192)
Prediction = tuple[float, str]  # seconds, and the limit that sets them


def predict(kernel: str, sizes: Sizes, later: bool) -> Prediction:
    """A launch of a kernel with the configuration that is shipped for an H200."""
    return _largest(kernel_work(kernel, sizes, later))


def product(tokens: int, inner: int, outer: int) -> Prediction:
    """A bf16 product [tokens, inner] x [inner, outer] by cuBLAS, on all multiprocessors."""
    moved = 2.0 * (tokens * inner + inner * outer + tokens * outer)
    return _largest(Work(moved, 2.0 * tokens * inner * outer, programs=H200.multiprocessors))


def pointwise(elements: int) -> Prediction:
    """A kernel that reads or writes so many bf16 elements."""
    return _largest(Work(2.0 * elements, 0.0))


def _largest(work: Work) -> Prediction:
    times = H200.times(work)
    limit = max(times, key=lambda name: times[name])
    return times[limit] + H200.launch, limit if times[limit] > H200.launch else "launch"


def dense_parts(s: Sizes) -> dict[str, tuple[int, Prediction]]:
    """The dense MLP of Transformers, as part -> (times, one): three products, activation, multiplication."""
    N, D, F = s.tokens, s.hidden, s.intermediate
    return {
        "gate, up": (2, product(N, D, F)),
        "down": (1, product(N, F, D)),
        "activation": (1, pointwise(2 * N * F)),
        "multiplication": (1, pointwise(3 * N * F)),
    }


def layer_parts(s: Sizes) -> dict[str, tuple[int, Prediction]]:
    """This layer's launches, as part -> (times, one); see docs/kernels.md."""
    N, D, F, G, T, low = s.tokens, s.hidden, s.intermediate, padded(s.gru_width), s.rounds, s.experts * s.rank
    parts = {
        "gate, up": (2, product(N, D, F)),
        "routing, first round": (1, predict("routing_forward", s, False)),
        "low-rank A": (1, product(N, D, 2 * low)),
        "experts, first round": (1, predict("experts_forward", s, False)),
        "down": (1, product(N, F, D)),
        "down B": (1, product(N, low, D)),
        "order": (T * (N > SKINNY_TOKENS), predict("routing_order", s, False)),
        "GRU input Q c": (T - 1, product(N, F, 3 * G)),
        "GRU input of z": (T - 1, product(N, low, 3 * G)),
        "GRU, first step": (int(T > 1), predict("gru_forward", s, False)),
        "read again h and H": (T - 1, product(N, 2 * G, 2 * low + 2 * G)),
        "routing, later rounds": (T - 1, predict("routing_forward", s, True)),
        "experts, later rounds": (T - 1, predict("experts_forward", s, True)),
        "GRU, later steps": (max(0, T - 2), predict("gru_forward", s, True)),
    }
    return {name: part for name, part in parts.items() if part[0]}


def total(parts: dict[str, tuple[int, Prediction]]) -> float:
    """Seconds of all parts, one after the other."""
    return sum(times * one[0] for times, one in parts.values())


def sizes_at(tokens: int, rounds: int = 3) -> Sizes:
    """Llama-3-8B's layer in one case."""
    return replace(LLAMA_8B, tokens=tokens, rounds=rounds)


def beside(content: dict[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """A GPU result's kernels and layers of Llama-3-8B beside their predictions; no lines where it has none of them."""
    found: list[tuple[str, float, str, float]] = []
    if content["conditions"]["device"]["kind"] == "cuda":
        for row in content["kernels"]:
            if row["kernel"] in KERNELS and (row["experts"], row.get("dtype")) == (LLAMA_8B.experts, LLAMA_8B.dtype):
                seconds_, limit = predict(row["kernel"], sizes_at(row["tokens"]), row["round"] == "later")
                what = f"{row['kernel']}, {row['round']} round, {row['tokens']:,} tokens"
                found.append((what, seconds_, limit, row["seconds"]["median"]))
        for row in content["rows"]:
            sizes = row["sizes"]
            named = tuple(row[key] for key in ("group", "mode", "model", "provider"))
            alike = (sizes["experts"], sizes["dtype"]) == (LLAMA_8B.experts, LLAMA_8B.dtype)
            if alike and named == ("layer", "inference", MODEL, "triton"):
                parts = layer_parts(sizes_at(sizes["tokens"], sizes["rounds"]))
                largest = max(parts, key=lambda name: parts[name][0] * parts[name][1][0])
                found.append((row["case"], total(parts), f"mostly {largest}", row["seconds"]["median"]))
    lines = [[what, seconds(p), limit, seconds(m), f"{m / p:.2f}"] for what, p, limit, m in found]
    return ("", "predicted", "limit", "measured", "measured / predicted"), lines


def tables() -> list[str]:
    """The predictions of today's kernels and of the layer, as Markdown."""
    lines = []
    for kernel in KERNELS:
        for later in (False, True)[: 1 if kernel == "routing_order" else 2]:
            for tokens in TOKENS:
                work = kernel_work(kernel, sizes_at(tokens), later)
                time, limit = _largest(work)
                figures = [f"{value / 1e6:,.1f}" for value in (work.bytes or 0, work.operations / 1e3, work.l2_bytes)]
                name = f"{kernel}, {'later' if later else 'first'} round"
                lines.append([name, str(tokens), *figures, str(work.programs), f"{1e6 * time:,.1f}", limit])
    header = ("kernel", "tokens", "MB", "GFLOP", "L2 MB", "programs", "predicted us", "limit")
    layers = []
    for tokens, rounds in ((8192, 3), (8192, 1), (16, 3), (1, 3)):
        layer, dense = (total(parts(sizes_at(tokens, rounds))) for parts in (layer_parts, dense_parts))
        figures = [f"{1e6 * layer:,.1f}", f"{1e6 * dense:,.1f}", f"{layer / dense:.2f}"]
        layers.append([f"{tokens} tokens, T={rounds}", *figures])
    return [*markdown_table(header, lines), "", *markdown_table(("forward", "layer us", "dense us", "ratio"), layers)]


if __name__ == "__main__":
    print("\n".join(tables()))
