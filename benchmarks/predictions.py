"""What the kernels should take on an H200, by arithmetic: ``python -m benchmarks.predictions`` writes PREDICTIONS.md.

Beside each prediction stands what was measured, from the newest result of a GPU run, or that nothing was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.document import RESULTS, WITHOUT_ROUNDS, ResultError, load
from benchmarks.limits import H200
from benchmarks.roofline import Work, experts_per_tile, experts_work, shipped_config, work
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import SIZE_CLASSES, SKINNY_TOKENS
from graphmoe_kernels.rethinking.folding import padded

FOLDER = Path(__file__).resolve().parent
PAGE, OCCUPANCY = FOLDER / "PREDICTIONS.md", FOLDER / "aot_sm_90.json"
# The day on which the predictions were first written, before any of the kernels had run on a GPU.
WRITTEN = "2026-11-23"
LLAMA_8B = Sizes(4096, 14336, 409, dtype="bf16")
TOKENS = (1, 16, 64, 2048, 8192)
# kernel, whether in a later round, and the start and the end of what the compile inspector calls it.
KERNELS = (
    ("forward_kernel", True, "experts forward", "bf16, later round"),
    ("forward_kernel", False, "experts forward", "bf16, first round"),
    ("backward_tokens_kernel", True, "experts backward_tokens", "bf16, later round"),
    ("backward_weights_kernel", True, "experts backward_weights", "bf16, later round"),
    ("route_forward", False, "routing forward", "x=bf16 router=fp32 offset=None n=8 k=2 statistics=none"),
    ("route_forward", True, "routing forward", "x=bf16 router=fp32 offset=fp32 n=8 k=2 statistics=topk"),
    ("route_backward", True, "routing backward", "logits=bf16 n=8 k=2 normalize=True statistics=topk"),
    ("order_tokens", False, "routing order", ""),
    ("gru_forward", True, "gru gru_forward", "bf16 HAS_STATE"),
    ("gru_backward", True, "gru gru_backward", "HAS_STATE RESET_STATE BIAS"),
)


class Prediction(NamedTuple):
    """Seconds, and the limit that sets them."""

    seconds: float
    limit: str


class Part(NamedTuple):
    """A launch of the layer (or some alike)."""

    name: str
    times: int
    one: Prediction

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return self.times * self.one.seconds


def predict(kernel: str, sizes: Sizes, later: bool, ordered: bool = True) -> Prediction:
    """A launch of one of this package's kernels, with the configuration that is shipped for an H200."""
    times = H200.times(work(kernel, sizes, later, ordered=ordered))
    limit = max(times, key=lambda name: times[name])
    return Prediction(times[limit] + H200.launch, limit if times[limit] > H200.launch else "launch")


def product(tokens: int, inner: int, outer: int) -> Prediction:
    """A bf16 product [tokens, inner] x [inner, outer] by cuBLAS."""
    moved = 2 * (tokens * inner + inner * outer + tokens * outer) / H200.bandwidth
    computed = 2 * tokens * inner * outer / H200.matrix
    seconds = max(moved, computed)
    limit = "launch" if seconds < H200.launch else "memory" if moved > computed else "matrix"
    return Prediction(seconds + H200.launch, limit)


def pointwise(elements: int) -> Prediction:
    """A kernel that reads or writes so many bf16 elements."""
    return Prediction(2 * elements / H200.bandwidth + H200.launch, "memory")


def dense_parts(sizes: Sizes) -> list[Part]:
    """The dense MLP of Transformers: three products, the activation and the multiplication."""
    N, D, F = sizes.tokens, sizes.hidden, sizes.intermediate
    return [
        Part("gate, up", 2, product(N, D, F)),
        Part("activation", 1, pointwise(2 * N * F)),
        Part("multiplication", 1, pointwise(3 * N * F)),
        Part("down", 1, product(N, F, D)),
    ]


def layer_parts(sizes: Sizes) -> list[Part]:
    """The folded layer's forward with the fold at hand."""
    N, D, F, G, T = sizes.tokens, sizes.hidden, sizes.intermediate, padded(sizes.gru_width), sizes.rounds
    low = sizes.experts * sizes.rank
    parts = [
        Part("gate, up", 2, product(N, D, F)),
        Part("routing, first round", 1, predict("route_forward", sizes, False)),
        Part("low-rank A", 1, product(N, D, 2 * low)),
        Part("experts, first round", 1, predict("forward_kernel", sizes, False)),
        Part("down", 1, product(N, F, D)),
        Part("down B", 1, product(N, low, D)),
    ]
    if N > SKINNY_TOKENS:
        parts.append(Part("order", T, predict("order_tokens", sizes, False)))
    if T > 1:
        parts += [
            Part("GRU input Q c", T - 1, product(N, F, 3 * G)),
            Part("GRU input of z", T - 1, product(N, low, 3 * G)),
            Part("GRU, first step", 1, predict("gru_forward", sizes, False)),
            Part("read again h and H", T - 1, product(N, 2 * G, 2 * low + 2 * G)),
            Part("routing, later rounds", T - 1, predict("route_forward", sizes, True)),
            Part("experts, later rounds", T - 1, predict("forward_kernel", sizes, True)),
        ]
    if T > 2:
        parts.append(Part("GRU, later steps", T - 2, predict("gru_forward", sizes, True)))
    return parts


def total(parts: Iterable[Part]) -> float:
    """Seconds of all parts, one after the other."""
    return sum(part.seconds for part in parts)


class Targets(NamedTuple):
    """A ratio to the dense MLP, and the most that it may be."""

    what: str
    tokens: int
    rounds: int
    at_most: float


TARGETS = (
    Targets("prefill", 8192, 3, 1.6),
    Targets("prefill", 8192, 1, 1.15),
    Targets("decode in a graph", 1, 3, 1.7),
    Targets("decode in a graph", 16, 3, 1.7),
)


def newest_result(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The content of the newest result of a GPU run, or None."""
    found = []
    for path in folder.glob("cuda-*.json"):
        with contextlib.suppress(ResultError):  # `python -m benchmarks.report` names the files that are none
            content = load(path)
            if content["conditions"].get("sizes") == "llama-3-8b":
                found.append((content["conditions"]["date"], path.name, content))
    return max(found, key=lambda each: each[:2])[2] if found else None


def measured_kernel(result: dict[str, Any] | None, kernel: str, tokens: int, later: bool) -> float | None:
    """Median seconds of a kernel in order (where there is one) with eight experts."""
    for row in (result or {}).get("kernels", []):
        same = row["kernel"] == kernel and row["tokens"] == tokens and row["experts"] == LLAMA_8B.experts
        if same and (row["round"] == "later") == later and row.get("ordered", True):
            return row["seconds"]["median"]
    return None


def measured_layer(result: dict[str, Any] | None, tokens: int, rounds: int, provider: str) -> float | None:
    """Median seconds of a provider's forward: in a graph for few tokens."""
    rounds = 1 if provider in WITHOUT_ROUNDS else rounds
    for row in (result or {}).get("rows", []):
        sizes, graph = row["sizes"], tokens <= SKINNY_TOKENS
        same = (row["group"], row["mode"], row["graph"], row["provider"]) == ("layer", "inference", graph, provider)
        if same and (sizes["tokens"], sizes["rounds"], sizes["experts"]) == (tokens, rounds, LLAMA_8B.experts):
            return row["seconds"]["median"]
    return None


def blocks_per_sm(readings: Sequence[dict[str, Any]], kernel: str, start: str, end: str, tokens: int) -> str:
    """Blocks of a kernel that a multiprocessor holds at once, as the compile inspector read them.

    "-" where it has not read the configuration that is shipped.
    """
    size, config = SIZE_CLASSES[tokens > SKINNY_TOKENS], shipped_config(kernel, tokens)
    settings = {f"{name.removeprefix('num_')}={value}" for name, value in config.items()}
    for reading in readings:
        name = reading["name"]
        fits = name.startswith(f"{start} {size}") and name.endswith(end)
        if fits and settings <= set(reading["configuration"].split()) and reading["blocks_per_sm"] is not None:
            return str(reading["blocks_per_sm"])
    return "-"


def low_rank_forms(sizes: Sizes) -> list[tuple[str, float, float]]:
    """How a round's low-rank products can be done: name, million multiply-adds a token, bytes from the L2 cache.

    Masked: every slot multiplies with all experts' matrices side by side, n*r wide. By tile: with the matrices of the
    experts that are in the tile, one expert at a time.
    """
    N, F, n, k, r = sizes.tokens, sizes.intermediate, sizes.experts, sizes.top_k, sizes.rank
    block = shipped_config("forward_kernel", N)["BLOCK_M"]
    tiles, matrices = -(-N // block), 3 * F * r * sizes.element
    rank = max(16, 1 << (r - 1).bit_length())
    columns = 2 * rank + max(16, 1 << (k * rank - 1).bit_length())
    found = [("masked, all experts", k * 3 * n * r * F / 1e6, float(tiles * k * n * matrices))]
    for name, ordered in (("by tile, tokens as they come", False), ("by tile, tokens in order", True)):
        present = experts_per_tile(N, n, k, block, ordered)
        found.append((name, k * present * columns * F / 1e6, tiles * k * present * matrices))
    return [*found, ("needed", k * 3 * r * F / 1e6, 0.0)]


def tile_forms(sizes: Sizes) -> list[tuple[int, int, Work]]:
    """The work of the experts' forward in a later round by the tile's tokens and columns."""
    config = shipped_config("forward_kernel", sizes.tokens)
    return [
        (rows, columns, experts_work("forward_kernel", sizes, True, config | {"BLOCK_F": columns}, rows, True, 132))
        for rows, columns in ((64, 64), (64, 128), (128, 64), (128, 128), (256, 64))
    ]


def product_apart(sizes: Sizes) -> tuple[float, Work]:
    """Seconds of a later round's experts with H M^T by cuBLAS, and the work of a kernel that adds it to P_1."""
    N, F, G = sizes.tokens, sizes.intermediate, padded(sizes.gru_width)
    first = work("forward_kernel", sizes, False)
    read = 2 * N * F * sizes.element
    kernel = first._replace(bytes=first.bytes + read, l2_bytes=first.l2_bytes + read)
    return product(N, G, 2 * F).seconds + max(H200.times(kernel).values()) + H200.launch, kernel


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    from benchmarks.predictions_page import page

    p = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=PAGE, help="(%(default)s)")
    options = p.parse_args(arguments)
    readings = json.loads(OCCUPANCY.read_text()) if OCCUPANCY.exists() else []
    options.out.write_text(page(newest_result(), readings))
    print(f"written to {options.out}")


def sizes_at(tokens: int, rounds: int = 3, experts: int = LLAMA_8B.experts) -> Sizes:
    """Llama-3-8B's layer in one case."""
    return replace(LLAMA_8B, tokens=tokens, rounds=rounds, experts=experts)


if __name__ == "__main__":
    main()
