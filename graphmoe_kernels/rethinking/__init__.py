"""Self-rethinking: T rounds of routed LoRA experts over a frozen MLP, joined by a low-rank GRU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphmoe_kernels.rethinking.cache import FoldCache, exporting, fold_sources
from graphmoe_kernels.rethinking.checks import checked_call
from graphmoe_kernels.rethinking.folded import folded_rounds
from graphmoe_kernels.rethinking.folding import FoldSettings
from graphmoe_kernels.rethinking.kinds import LayerWeights
from graphmoe_kernels.rethinking.literal import literal_rounds
from graphmoe_kernels.rethinking.policy import FOLD_MODES, fold_break_even
from graphmoe_kernels.rethinking.weights import RethinkingOutput, RethinkingSpec, padded
from graphmoe_kernels.validation import check_choice, check_type


def rethink(
    x: Tensor,
    weights: LayerWeights,
    spec: RethinkingSpec,
    *,
    fold: str = "auto",
    cache: FoldCache | None = None,
    backend: str = "auto",
) -> RethinkingOutput:
    """T rounds of self-rethinking (GraphMoE, Algorithm 1), folded where that is exact and pays.

    Args:
        x: [N, D], the MLP's input. The base projections decide the compute dtype (autocast included); adapters of
            another float dtype are cast to it, the router runs in fp32 at least.
        weights: see `LayerWeights`.
        spec: see `RethinkingSpec`.
        fold: ``"always"``, ``"never"`` or ``"auto"``: fold when the fold is cached, or when there are at least
            `fold_break_even` tokens; else run the literal loop. All give the same result up to rounding. A graph that
            is exported (torch.export, ONNX, torch.jit.trace) keeps no fold: there ``"always"`` builds it in the graph,
            at every call, and ``"auto"`` does where every token count that the graph allows is past the break-even.
        cache: where the fold is kept between calls; used whenever no gradient can reach the fold's sources.
        backend: see `graphmoe_kernels.backend`.

    Returns:
        y [N, D] and the rounds' router logits.

    Raises:
        TypeError: x or a weight is no dense tensor of fp64, fp32, fp16 or bf16, x has another dtype than a `DenseMLP`
            outside of autocast, or a setting is of another type.
        ValueError: settings or shapes that make no sense together, tensors on several devices (each message names
            them).
    """
    check_choice("fold", fold, FOLD_MODES)
    check_type("cache", cache, FoldCache, optional=True)
    call = checked_call(x, weights, spec, backend)
    if fold == "never":
        return literal_rounds(x, weights, call)
    if cache is not None and not _differentiable(weights) and not exporting():
        kept = cache.get(weights, FoldSettings(_compute_dtype(x), spec.scale, spec.candidate_input))
        return folded_rounds(x, weights, call, kept)
    if spec.rounds == 1 or (fold == "auto" and not _pays(x, weights, spec)):
        return literal_rounds(x, weights, call)
    return folded_rounds(x, weights, call)


def _differentiable(weights: LayerWeights) -> bool:
    """Whether a gradient can reach what the fold is built from."""
    return torch.is_grad_enabled() and any(s.requires_grad for s in fold_sources(weights))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # autocast leaves fp64 alone
        return x.dtype
    return torch.get_autocast_dtype(device)


def _pays(x: Tensor, weights: LayerWeights, spec: RethinkingSpec) -> bool:
    """Whether x has the tokens from which building a fold for this call costs less than it saves."""
    least = _break_even(weights, spec)
    if not exporting():
        return x.shape[0] >= least
    if torch.jit.is_tracing() or math.isinf(least):
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads Triton

    # No guess about a token count that is symbolic: it would bound the graph to the counts on one side.
    return statically_known_true(x.shape[0] >= math.ceil(least))


def _break_even(weights: LayerWeights, spec: RethinkingSpec) -> float:
    assert weights.gru is not None
    lora = weights.experts.lora
    hidden, intermediate, dora = lora.gate_A.shape[2], lora.gate_B.shape[1], lora.magnitudes is not None
    return fold_break_even(hidden, intermediate, padded(weights.gru.width), spec.rounds, dora)
