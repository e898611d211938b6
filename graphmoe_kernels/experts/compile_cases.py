"""The calls of the experts that are compiled ahead of time: what a Llama-3-8B layer runs, and odd ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from graphmoe_kernels.aot.case import DTYPES, SIZES, Variant, empty
from graphmoe_kernels.experts.operands import FLOATING, Dropout, ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton import launch
from graphmoe_kernels.experts.triton.sizes import SLOT_TOKENS

WIDTH = 14336
UNALIGNED_WIDTH = 712  # F that is no multiple of 16, so that rows are not aligned
EXPERTS = 8
APART = SLOT_TOKENS * EXPERTS  # tokens of these experts whose slots have launches of their own
GRU_WIDTH = 416


class Layer(NamedTuple):
    """What a layer switches on: each of them compiles other code."""

    name: str
    later: bool = True
    dropout: bool = False
    scales: bool = False
    biases: bool = False
    slots: int = 2
    rank: int = 16
    experts: int = EXPERTS
    width: int = WIDTH


FIRST, LATER = Layer("first round", later=False), Layer("later round")
LAYERS = {
    "wide": (
        FIRST,
        LATER,
        Layer("later round, dropout", dropout=True),
        Layer("scale vectors and biases", later=False, scales=True, biases=True),
        Layer("scale vectors, later round", scales=True),
        Layer("later round, F not divisible by 16", width=UNALIGNED_WIDTH),
        Layer("scale vectors and biases, one slot, dropout", scales=True, biases=True, dropout=True, slots=1),
        Layer("64 experts", experts=64),
    ),
    "skinny": (
        FIRST,
        LATER,
        Layer("later round, F not divisible by 16", width=UNALIGNED_WIDTH),
    ),
}
WIDE_RANK = (Layer("rank 80, LoRA", slots=1, rank=80, experts=1), Layer("k = 8", slots=8))


def variants() -> Iterator[Variant]:
    """Every kernel, size class and dtype, forward and backward."""
    for size, tokens in SIZES.items():
        for dtype in DTYPES:
            for layer in LAYERS[size][:2] if dtype == "fp16" else (*LAYERS[size], *WIDE_RANK):
                yield Variant(f"{size} {dtype}, {layer.name}", partial(_experts, tokens, DTYPES[dtype], layer))
            for later in (False, True):
                name = f"{size} {dtype}, mixed experts, {'an update' if later else 'no update'}"
                yield Variant(name, partial(_shared, tokens, DTYPES[dtype], later))
            if size == "skinny":
                for layer in (*LAYERS[size], *WIDE_RANK):
                    yield Variant(f"one token {dtype}, {layer.name}", partial(_forward, DTYPES[dtype], layer))
    # Few tokens for their pairs, and many experts: a slot of a token is a row. With more tokens per expert, slots have
    # launches of their own.
    rows = (*LAYERS["wide"], *(Layer(f"n = {n}, k = {k}", experts=n, slots=k) for n, k in ((16, 4), (256, 8), (23, 2))))
    for dtype in ("bf16", "fp16"):
        for layer in rows if dtype == "bf16" else (LATER,):
            yield Variant(f"rows {dtype}, {layer.name}", partial(_experts, APART - 1, DTYPES[dtype], layer))
    for layer in LAYERS["wide"][:6]:
        yield Variant(f"rows apart bf16, {layer.name}", partial(_experts, APART, torch.bfloat16, layer))
    yield Variant("wide bf16, 22 experts: 256 pairs", partial(_experts, 8192, torch.bfloat16, Layer("", experts=22)))


def _update(tokens: int, width: int, dtype: torch.dtype) -> LowRankUpdate:
    """A later round's: the sum of the states lies beside the last state."""
    state, fold = empty(tokens, 2 * GRU_WIDTH, dtype=dtype)[:, GRU_WIDTH:], empty(width, GRU_WIDTH, dtype=dtype)
    return LowRankUpdate(state, fold, fold)


def _forward(dtype: torch.dtype, layer: Layer) -> None:
    """A round of a layer with one token, forward."""
    launch.forward(_operands(1, dtype, layer), 2.0, "silu")


def _experts(tokens: int, dtype: torch.dtype, layer: Layer) -> None:
    """A round of a layer, forward and backward."""
    operands = _operands(tokens, dtype, layer)
    launch.forward(operands, 2.0, "silu")
    d_low_down = empty(tokens, layer.experts * layer.rank, dtype=dtype)
    launch.backward(operands.pre_activations.gate, d_low_down, operands, 2.0, "silu", frozenset(FLOATING))


def _operands(tokens: int, dtype: torch.dtype, layer: Layer) -> ExpertOperands:
    n, r, k, width = layer.experts, layer.rank, layer.slots, layer.width
    own = partial(empty, dtype=dtype)
    wide, low, B, scale, bias = (
        own(tokens, width),
        own(tokens, 2 * n * r),
        own(n, width, r),
        empty(n, width),
        own(width),
    )
    return ExpertOperands(
        GateUp(wide, wide),
        low,
        GateUp(B, B),
        own(n, r, width),
        empty(tokens, k),
        empty(tokens, k, dtype=torch.int32),
        low_update=low if layer.later and not layer.dropout else None,
        update=_update(tokens, width, dtype) if layer.later else None,
        scales=GateUp(scale, scale) if layer.scales else None,
        biases=GateUp(bias, bias) if layer.biases else None,
        dropout=Dropout(0.1, empty(1, dtype=torch.int64)) if layer.dropout else None,
    )


def _shared(tokens: int, dtype: torch.dtype, later: bool) -> None:
    """act(g) * u of what all tokens share, forward and backward."""
    wide, update = empty(tokens, WIDTH, dtype=dtype), _update(tokens, WIDTH, dtype) if later else None
    launch.swiglu(GateUp(wide, wide), update, "silu")
    launch.swiglu_backward(wide, GateUp(wide, wide), update, "silu", frozenset(FLOATING))
