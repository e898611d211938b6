"""What a call of each provider and a launch of each kernel need: bytes and operations, from the sizes.

A layer's and an operator's follow the cost model. A kernel's also count what its tiles read from the L2 cache, which
follows from the configuration that cuts its work.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from graphmoe_kernels.cost import Sizes, Term, fold_build, layer_terms, round_terms
from graphmoe_kernels.experts.triton.sizes import cut, program_slots
from graphmoe_kernels.launching import SIZE_CLASSES, SKINNY_TOKENS, Config, config_table, power_of_two
from graphmoe_kernels.rethinking.policy import fold_break_even
from graphmoe_kernels.rethinking.weights import padded

# Products with frozen weights: their backward has the gradient of the input alone.
FROZEN = ("base gate, up", "base down")
# An operator's kernels, and its terms of the cost model in the first and in a later round.
OPERATORS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "routing": (("routing_forward", "routing_backward"), ("router",), ("router update",)),
    "expert_swiglu": (
        ("experts_forward", "experts_backward_tokens", "experts_backward_weights"),
        *2 * (("fold update H M^T", "low-rank B (gate, up)", "down A"),),
    ),
    "gru_step": (("gru_forward", "gru_backward"), *2 * (("GRU candidate, h and H",),)),
}
KERNELS = (*(kernel for kernels, _, _ in OPERATORS.values() for kernel in kernels), "routing_order")
# Integer operations of one comparison of two tokens: the compare, the conversion and the addition.
ORDER_OPERATIONS = 3
COMPARED = 16384


class Work(NamedTuple):
    """What a call needs at least."""

    bytes: float | None  # each weight, input and output once; None where that is no property of the task
    operations: float  # floating-point, a multiply-add is two; of a kernel as it executes them, on the matrix units
    l2_bytes: float = 0.0  # of a kernel, what its tiles read and write together, from the L2 cache at best
    programs: int = 1  # of a kernel
    integer: float = 0.0  # integer operations, where they are a kernel's work


def layer_work(form: str, sizes: Sizes, training: bool) -> Work:
    """A whole layer's: ``form`` is one of the cost model's, or ``"lora"`` (the MLP with one LoRA on each projection).

    In training a product costs another one for the gradient of its input, and a third for that of its weight where
    that is trained; a fold is built anew, with a backward of its own. How many bytes a training step has to move
    depends on what it keeps for its backward, so they are not counted.
    """
    pays_from = fold_break_even(
        sizes.hidden, sizes.intermediate, padded(sizes.gru_width), sizes.rounds, dora=sizes.dora
    )
    if form == "folded" and training and sizes.tokens < pays_from:
        form = "literal"
    terms = _terms(form, sizes)
    if not training:
        moved = sum(term.weights + sizes.tokens * (term.read + term.written) for term in terms)
        return Work(float(moved), 2.0 * sizes.tokens * sum(term.multiply_adds for term in terms))
    products = sum(term.multiply_adds * (2 if term.name in FROZEN else 3) for term in terms)
    build = 2 * sum(fold_build(sizes).values()) if form == "folded" and sizes.rounds > 1 else 0
    return Work(None, 2.0 * (sizes.tokens * products + build))


def _terms(form: str, sizes: Sizes) -> list[Term]:
    if form != "lora":
        return layer_terms(form, sizes)
    D, F, r, e = sizes.hidden, sizes.intermediate, sizes.rank, sizes.element
    return [
        *layer_terms("dense", sizes),
        Term("LoRA A of gate, up", 2 * r * D, 2 * r * D * e, D * e, 2 * r * e),
        Term("LoRA B of gate, up", 2 * r * F, 2 * r * F * e, 2 * r * e),
        Term("LoRA A of down", r * F, r * F * e, F * e, r * e),
        Term("LoRA B of down", r * D, r * D * e, r * e),
    ]


def operator_work(group: str, sizes: Sizes, later: bool, training: bool) -> Work:
    """An operator's, whoever computes it: with the backward in training.

    Bytes are those of the kernels that compute it (inputs and outputs once); operations are the ones needed, where a
    kernel's own are rounded up to whole tiles.
    """
    kernels, *names = OPERATORS[group]
    moved = sum(kernel_work(kernel, sizes, later).bytes or 0.0 for kernel in kernels[: None if training else 1])
    terms = round_terms("folded", replace(sizes, rounds=3), 2 if later else 1)
    products = sum(term.multiply_adds for term in terms if term.name in names[later])
    return Work(moved, 2.0 * sizes.tokens * products * (3 if training else 1))


def shipped_config(kernel: str, tokens: int, device: str = "sm_90", dtype_class: str = "half") -> Config:
    """The configuration that the package ships for a kernel at a token count."""
    table = config_table(device, kernel.partition("_")[0])[kernel][SIZE_CLASSES[tokens > SKINNY_TOKENS]]
    return table[dtype_class if dtype_class in table else "float"]  # some kernels read nothing in half precision


@functools.cache
def experts_per_tile(tokens: int, experts: int, top_k: int, block: int, ordered: bool) -> float:
    """Experts that a slot finds in a tile of ``block`` tokens, on average, with uniform routing from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices  # [N, k], by probability
    if ordered:
        low = chosen.sort(dim=1).values
        key = low[:, 0] * experts + (low[:, 1] if top_k > 1 else 0)
        chosen = chosen[key.argsort(stable=True)]
    tiles = chosen.split(block)
    return sum(tile[:, j].unique().numel() for tile in tiles for j in range(top_k)) / (len(tiles) * top_k)


def kernel_work(
    kernel: str, s: Sizes, later: bool, ordered: bool = True, sms: int = 132, device: str = "sm_90"
) -> Work:
    """The work of one launch of a kernel with the configuration shipped for a device class.

    ``later``: in a round after the first; ``ordered``: with tokens in order (more than `SKINNY_TOKENS` ever are);
    ``sms``: the device's multiprocessors.

    Raises:
        ValueError: a kernel whose work is not known.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; expected one of {', '.join(KERNELS)}")
    config = shipped_config(kernel, s.tokens, device, "half" if s.element == 2 else "float")
    if kernel.startswith("experts"):
        # The tiles of the weights' backward are those of the tokens' backward, whose lists of experts it reads.
        tiled = kernel.replace("backward_weights", "backward_tokens")
        block = shipped_config(tiled, s.tokens, device, "half" if s.element == 2 else "float")["BLOCK_M"]
        return experts_work(kernel, s, later, config, block, ordered and s.tokens > SKINNY_TOKENS, sms)
    if kernel.startswith("gru"):
        return _gru_work(kernel, s, later, config)
    block = config["BLOCK_M"]
    tiles = math.ceil(s.tokens / block)
    if kernel == "routing_order":
        seen = min(s.tokens, COMPARED)
        own, again = 4.0 * s.tokens * (s.top_k + 1), tiles * 4.0 * s.top_k * seen
        return Work(own, 0, again, tiles, integer=ORDER_OPERATIONS * s.tokens * seen)
    return _routing_work(kernel, s, later, block, tiles)


def _routing_work(kernel: str, s: Sizes, later: bool, block: int, tiles: int) -> Work:
    N, n, inner = s.tokens, s.experts, padded(s.gru_width) if later else s.hidden
    rows = 4 * N * (n + 2 * s.top_k)  # logits, weights, experts
    if kernel == "routing_backward":
        moved = 2 * rows + 4 * N * n
        return Work(moved, 0, moved, tiles)
    own = N * inner * s.element + rows + 4 * N * n * later  # a later round adds the first one's logits
    lanes = max(1 if block == 1 else 16, power_of_two(n))  # one token is routed without matrix units
    products = 3 if s.element == 2 and block > 1 else 1  # an fp32 router is three bf16 ones
    operations = 2 * products * tiles * block * lanes * inner
    return Work(own + 4 * n * inner, operations, own + tiles * 4 * n * inner, tiles)


def _gru_work(kernel: str, s: Sizes, later: bool, config: Config) -> Work:
    N, G, e = s.tokens, padded(s.gru_width), s.element
    tiles, columns = math.ceil(N / config["BLOCK_M"]), math.ceil(G / config["BLOCK_G"])
    weight = G * G * e * later
    if kernel == "gru_forward":
        own = N * G * e * (3 + 2 + 4 * later)  # inputs, out; recurrent, state, total
        again = N * G * e * 3 * later  # what the candidate's product reads: every column tile anew
    else:
        own = N * G * (e * (3 + 2 + 3 + (2 + 1 + 1) * later) + 4 * later)  # inputs, grad, d_inputs; ..., candidate
        again = N * G * (4 * e + 4) * later
    operations = 2 * tiles * config["BLOCK_M"] * G * G * later
    return Work(own + weight, operations, own + columns * again + tiles * weight, tiles * columns)


def experts_work(kernel: str, s: Sizes, later: bool, config: Config, block: int, ordered: bool, sms: int) -> Work:
    """The work of an expert kernel with tiles of ``block`` tokens and the columns of ``config``."""
    N, F, G, n, k, r, e = s.tokens, s.intermediate, padded(s.gru_width), s.experts, s.top_k, s.rank, s.element
    rank = max(16, power_of_two(r))
    columns = max(16, power_of_two(k * rank))
    tiles, blocks = math.ceil(N / block), math.ceil(F / config["BLOCK_F"])
    visits = tiles * k * experts_per_tile(N, n, k, block, ordered)  # of an expert by a slot of a tile
    tensors, width = {  # [N, F] that are read or written; columns of the products with one expert's matrices
        "experts_forward": (3, 2 * rank + columns),
        "experts_backward_tokens": (5, 3 * rank + 2 * columns),
        "experts_backward_weights": (3, 6 * rank),
    }[kernel]
    wide, fold, state = tensors * N * F * e, 2 * F * G * e * later, N * G * e * later
    sums, low_matrices = N * (n * r * e + 12 * k), 3 * F * r * e
    low = N * 2 * k * r * e * (1 + later)  # a row reads its own expert's activations alone
    operations = 2 * tiles * block * 2 * F * G * later + 2 * visits * block * F * width
    moved = wide + low + fold + s.used_experts * low_matrices + state + sums
    through = wide + tiles * fold + blocks * state + visits * low_matrices + blocks * low + sums
    slots = program_slots(config, sms)
    programs = tiles * cut(blocks, tiles, slots)[0]
    if kernel == "experts_backward_weights":
        splits = cut(tiles, blocks, slots)[0]
        programs = blocks * splits
        moved += 4 * 3 * n * F * r * splits
        through += 2 * visits * 4 * 3 * F * r  # the running sums of an expert, read and written at each visit
    return Work(moved, operations, through, programs)
