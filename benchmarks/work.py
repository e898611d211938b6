"""What a call has to move and to compute, and what of a device that takes: the roofline beside every time.

A layer's and an operator's work follow the cost model. A kernel's bytes are those of the tensors that its launch got.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.devices import Device
from benchmarks.operators import DTYPES
from graphmoe_kernels.cost import Sizes, Term, fold_build, layer_terms, round_terms
from graphmoe_kernels.launching import Launch
from graphmoe_kernels.rethinking.policy import fold_break_even
from graphmoe_kernels.rethinking.weights import padded
from graphmoe_kernels.structures import tensors_in

# Products with frozen weights: their backward has the gradient of the input alone.
FROZEN = ("base gate, up", "base down")
FOLD, LOW_RANK = "fold update H M^T", ("low-rank B (gate, up)", "SwiGLU, combine", "down A")
# The terms of the cost model that an operator computes, in whichever rounds they are.
OPERATORS = {
    "routing": ("router", "router update"),
    "expert_swiglu": (FOLD, *LOW_RANK),
    "gru_step": ("GRU candidate, h and H",),
}
# And a kernel, so many times, a name given twice once more; kernels without matrix products are left out. The stream
# gets H M^T as a tensor, forward and backward.
KERNELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "routing_forward": (1, OPERATORS["routing"]),
    "routing_backward": (1, OPERATORS["routing"]),
    "routing_backward_router": (1, OPERATORS["routing"]),
    "experts_forward": (1, OPERATORS["expert_swiglu"]),
    "experts_forward_token": (1, OPERATORS["expert_swiglu"]),
    "experts_stream": (1, LOW_RANK),
    "experts_stream_backward_tokens": (1, (*LOW_RANK, LOW_RANK[0])),
    "experts_stream_backward_weights": (2, LOW_RANK),
    "gru_forward": (1, OPERATORS["gru_step"]),
    "gru_backward": (2, OPERATORS["gru_step"]),
}
# What limits are measured on: bytes of a copy, and m, n, k of a product.
LIMIT_SIZES = {"cpu": (2**28, (1024, 4096, 1024)), "cuda": (2**31, (8192, 14336, 4096))}
SMALL_SIZES = (2**20, (64, 64, 64))  # for the tiny model, whose figures mean nothing


class Work(NamedTuple):
    """What a call needs at least."""

    bytes: float | None  # each weight, input and output once; None where that is no property of the task
    operations: float  # of products, in floating point; a multiply-add is two

    def times(self, content: dict[str, Any]) -> dict[str, float]:
        """Seconds that each limit alone asks for, of those that a result's run measured."""
        limits = content["limits"]
        memory = (self.bytes or 0.0) / limits["copy bytes a second"]
        return {"memory": memory, "matrix": self.operations / limits["matrix operations a second"]}


def measure_limits(device: Device, small: bool, seconds: float, dtype: str) -> dict[str, Any]:
    """Bytes a second of a large copy (read and written), operations a second of a matrix product [m, k] x [k, n] of
    random data, by the medians of several; of ``small`` ones for a try."""
    copy_bytes, (m, n, k) = SMALL_SIZES if small else LIMIT_SIZES[device.kind]
    kind = DTYPES[dtype]
    large = torch.empty(copy_bytes // kind.itemsize, dtype=kind, device=device.torch).normal_()
    target = torch.empty_like(large)
    a, b = torch.randn(m, k, device=device.torch, dtype=kind), torch.randn(n, k, device=device.torch, dtype=kind)
    out = torch.empty(m, n, device=device.torch, dtype=kind)
    calls = {"copy": lambda: target.copy_(large), "matrix": lambda: torch.mm(a, b.T, out=out)}
    copy, product = (samples.summary() for samples in device.in_turns(calls, seconds).values())
    return {
        "copy bytes a second": 2 * copy_bytes / copy["median"],
        "copy bytes": copy_bytes,
        "copy seconds": copy,
        "matrix operations a second": 2 * m * n * k / product["median"],
        "matrix size": [m, n, k],
        "matrix seconds": product,
        "matrix dtype": dtype,
    }


def layer_work(form: str, sizes: Sizes, training: bool) -> Work:
    """A whole layer's: ``form`` is one of the cost model's, or ``"lora"`` (the MLP with one LoRA on each projection).

    In training a product costs another one for the gradient of its input, and a third for that of its weight where
    that is trained; a fold is built anew, with a backward of its own. How many bytes a training step has to move
    depends on what it keeps for its backward, so they are not counted.
    """
    widths = sizes.hidden, sizes.intermediate, padded(sizes.gru_width), sizes.rounds
    if form == "folded" and training and sizes.tokens < fold_break_even(*widths, dora=sizes.dora):
        form = "literal"
    found = _of_terms(_terms(form, sizes), sizes, training)
    build = 2 * sum(fold_build(sizes).values()) if form == "folded" and sizes.rounds > 1 and training else 0
    return found._replace(operations=found.operations + 2.0 * build)


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


def _of_terms(terms: Iterable[Term], sizes: Sizes, training: bool) -> Work:
    terms = list(terms)
    if training:
        products = sum(term.multiply_adds * (2 if term.name in FROZEN else 3) for term in terms)
        return Work(None, 2.0 * sizes.tokens * products)
    moved = sum(term.weights + sizes.tokens * (term.read + term.written) for term in terms)
    return Work(float(moved), 2.0 * sizes.tokens * sum(term.multiply_adds for term in terms))


def operator_work(group: str, sizes: Sizes, later: bool, training: bool) -> Work:
    """An operator's in the first round or a later one, whoever computes it."""
    return _of_terms(_round(OPERATORS[group], sizes, later), sizes, training)


def _round(names: Iterable[str], sizes: Sizes, later: bool) -> list[Term]:
    return [term for term in round_terms("folded", replace(sizes, rounds=3), 2 if later else 1) if term.name in names]


def kernel_work(launches: list[Launch], sizes: Sizes, later: bool) -> Work:
    """A kernel's in one call of its operator, which may launch it several times: every tensor that it got once, of
    the experts' matrices those that are read; and its products."""
    tensors = {(t.data_ptr(), t.shape): t for launch in launches for t in tensors_in(tuple(launch.arguments.values()))}
    read = sizes.used_experts / sizes.experts
    sums = [
        t.numel() * t.element_size() * (read if t.dim() == 3 and len(t) == sizes.experts else 1)
        for t in tensors.values()
    ]
    times, names = KERNELS.get(launches[0].name, (0, ()))
    products = times * sum(term.multiply_adds * names.count(term.name) for term in _round(names, sizes, later))
    return Work(float(sum(sums)), 2.0 * sizes.tokens * products)
