"""A layer's weights without memory, and the calls that it makes of them, for `graphmoe_kernels.aot.trace` to watch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.rethinking import rethink
from graphmoe_kernels.rethinking.chosen import ChosenExperts, SingleExpert
from graphmoe_kernels.rethinking.folded import rethink_folded
from graphmoe_kernels.rethinking.folding import Fold, FoldSettings, build_fold
from graphmoe_kernels.rethinking.kinds import ExpertKind, LayerWeights
from graphmoe_kernels.rethinking.literal import rethink_literal
from graphmoe_kernels.rethinking.mixed import MixedExperts
from graphmoe_kernels.rethinking.weights import (
    DenseMLP,
    ExpertWeights,
    GRUWeights,
    LinearRouters,
    Magnitudes,
    RethinkingSpec,
)

# alpha = 2r.
SCALE = 2.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def layer_weights(sizes: Sizes, adapters: torch.dtype, bias: bool = False) -> LayerWeights:
    """Make a layer of ``sizes`` on meta: its MLP, with or without biases, in their dtype; the adapter trainable."""
    D, F, G, n, r = sizes.hidden, sizes.intermediate, sizes.gru_width, sizes.experts, sizes.rank
    frozen = partial(torch.empty, dtype=DTYPES[sizes.dtype], device="meta")
    own: Any = partial(torch.empty, dtype=adapters, device="meta", requires_grad=True)
    biases = (frozen(F), frozen(F), frozen(D)) if bias else (None, None, None)
    base = DenseMLP(frozen(F, D), frozen(F, D), frozen(D, F), *biases)
    magnitudes = Magnitudes(own(n, F), own(n, F), own(n, D)) if sizes.dora else None
    lora = ExpertWeights(own(n, r, D), own(n, F, r), own(n, r, D), own(n, F, r), own(n, r, F), own(n, D, r), magnitudes)
    experts: ExpertKind = SingleExpert(lora)
    if sizes.routers == "layer":
        experts = ChosenExperts(lora, own(n, D))
    elif sizes.routers == "linear":
        experts = MixedExperts(lora, LinearRouters(own(n, D), own(n, D), own(n, F)))
    gru = GRUWeights(own(G, G + D), own(G, G + D), own(G, G + D), own(G), own(D, G)) if sizes.rounds > 1 else None
    return LayerWeights(base, experts, gru)


def training_step(sizes: Sizes, weights: LayerWeights, fold: str, dropout: float = 0.0) -> None:
    """Run a layer's forward and backward on x [N, D]; ``fold`` as in `graphmoe_kernels.rethink`."""
    x = _tokens(sizes).requires_grad_()
    rethink(x, weights, _spec(sizes, dropout), fold=fold, backend="triton").y.sum().backward()


def built_fold(sizes: Sizes, weights: LayerWeights) -> Fold:
    """Build the fold that inference keeps."""
    with torch.no_grad():
        return build_fold(weights, FoldSettings(DTYPES[sizes.dtype], SCALE, "expert_output"), copy=True)


def inference(sizes: Sizes, weights: LayerWeights, fold: Fold | None) -> None:
    """Run a layer's forward without gradients, folded, or literally where there is no ``fold``."""
    with torch.no_grad():
        if fold is None:
            rethink_literal(_tokens(sizes), weights, _spec(sizes), "triton")
        else:
            rethink_folded(_tokens(sizes), weights, _spec(sizes), "triton", fold)


def _tokens(sizes: Sizes) -> Tensor:
    return torch.empty(sizes.tokens, sizes.hidden, dtype=DTYPES[sizes.dtype], device="meta")


def _spec(sizes: Sizes, dropout: float = 0.0) -> RethinkingSpec:
    return RethinkingSpec(sizes.rounds, sizes.top_k, scale=SCALE, dropout=dropout)
