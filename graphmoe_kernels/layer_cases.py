"""The layers whose launches are compiled ahead of time: forward and backward, folded and literal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from graphmoe_kernels.aot.case import SIZES, Variant
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.meta_layer import DTYPES, built_fold, inference, layer_weights, training_step

# Llama 3 8B with the paper's adapter; G is no multiple of 16. A third round differs from the second in the GRU alone.
LLAMA = Sizes(4096, 14336, 409, experts=8, top_k=2, rank=16, rounds=2)


class Kind(NamedTuple):
    """What a layer is besides its tokens and dtype.

    Attributes:
        name: what is particular about it.
        sizes: its sizes and the kind of its experts.
        dropout: of the LoRA branches, in training.
        bias: whether the MLP has biases.
        adapters: the dtype of the adapter's weights; PEFT keeps those of training in fp32.
        literal: whether its literal loop is compiled too, which differs in router and GRU alone.
        fp16, fp32: whether it is compiled in these too.
    """

    name: str
    sizes: Sizes = LLAMA
    dropout: float = 0.0
    bias: bool = False
    adapters: torch.dtype = torch.float32
    literal: bool = False
    fp16: bool = False
    fp32: bool = True


KINDS = (
    Kind("MixLoRA", replace(LLAMA, rounds=3), literal=True, fp16=True),
    Kind("MixLoRA, adapters in bf16", replace(LLAMA, rounds=3), adapters=torch.bfloat16, literal=True, fp32=False),
    Kind("MixLoRA, n=64", replace(LLAMA, experts=64)),
    Kind("MixLoRA, n=64, adapters in bf16", replace(LLAMA, experts=64), adapters=torch.bfloat16, fp32=False),
    Kind("MixLoRA, T=1", replace(LLAMA, rounds=1), fp32=False),
    Kind("MixLoRA, n=64, T=1", replace(LLAMA, experts=64, rounds=1), fp32=False),
    Kind("MixLoRA, dropout", dropout=0.05),
    Kind("MixLoRA, F not divisible by 16", replace(LLAMA, hidden=256, intermediate=712, gru_width=25)),
    Kind("MixLoRA, k=8", replace(LLAMA, top_k=8)),
    Kind("MixDoRA, biases", replace(LLAMA, dora=True), bias=True),
    Kind("LoRA, r=80", replace(LLAMA, experts=1, top_k=1, rank=80, routers="none")),
    Kind("MoLA", replace(LLAMA, routers="linear"), fp32=False),
)
# Of these one token is compiled too: a size of 1 is known to the compiler.
ALONE = KINDS[:6]
# Of these so few tokens for each expert, too, that a launch of a stream has the rows of both slots.
MANY_EXPERTS, FEW_OF_EACH = [kind for kind in KINDS if kind.sizes.experts == 64], 512


def variants() -> Iterator[Variant]:
    """Every kind of layer for few and for many tokens."""
    for size, tokens in SIZES.items():
        for dtype in DTYPES:
            for kind in KINDS:
                if (dtype == "fp16" and not kind.fp16) or (dtype == "fp32" and not kind.fp32):
                    continue
                sizes = replace(kind.sizes, tokens=tokens, dtype=dtype)
                call = partial(_layer, kind, sizes)
                yield Variant(f"{size} {dtype}, {kind.name}", partial(call, folded=True))
                if kind.literal:
                    yield Variant(f"{size} {dtype}, {kind.name}, literal", partial(call, folded=False))
    for kind in ALONE:
        one = replace(kind.sizes, tokens=1, dtype="bf16")
        yield Variant(f"one token bf16, {kind.name}", partial(_layer, kind, one, folded=True))
    for kind in MANY_EXPERTS:
        few = replace(kind.sizes, tokens=FEW_OF_EACH, dtype="bf16")
        yield Variant(f"{FEW_OF_EACH} tokens bf16, {kind.name}", partial(_layer, kind, few, folded=True))


def _layer(kind: Kind, sizes: Sizes, folded: bool) -> None:
    """A training step and a forward in evaluation."""
    weights = layer_weights(sizes, kind.adapters, kind.bias)
    training_step(sizes, weights, "always" if folded else "never", kind.dropout)
    inference(sizes, weights, built_fold(sizes, weights) if folded else None)
