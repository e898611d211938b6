"""Self-rethinking: T rounds of routed LoRA experts over a frozen MLP, joined by a low-rank GRU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.backend import check_backend
from graphmoe_kernels.gru import CANDIDATE_ACTIVATIONS
from graphmoe_kernels.rethinking.cache import FoldCache, exporting, fold_sources
from graphmoe_kernels.rethinking.folded import rethink_folded
from graphmoe_kernels.rethinking.folding import Fold, FoldSettings, build_fold, padded
from graphmoe_kernels.rethinking.literal import rethink_literal
from graphmoe_kernels.rethinking.policy import FOLD_MODES, fold_break_even
from graphmoe_kernels.rethinking.reference import rethink_reference
from graphmoe_kernels.rethinking.weights import (
    BaseMLP,
    DenseMLP,
    ExpertWeights,
    GRUWeights,
    LayerWeights,
    LinearRouters,
    RethinkingOutput,
    RethinkingSpec,
)

CANDIDATE_INPUTS = ("expert_output", "hidden_state")


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
        TypeError: x is not floating point.
        ValueError: settings or shapes that make no sense together, x on another device (each message names them).
    """
    check_spec(spec, weights)
    check_input(x, weights)
    if fold not in FOLD_MODES:
        raise ValueError(f"unknown fold {fold!r}; expected one of {', '.join(map(repr, FOLD_MODES))}")
    check_backend(backend)
    if fold == "never":
        return rethink_literal(x, weights, spec, backend)

    differentiable = torch.is_grad_enabled() and any(s.requires_grad for s in fold_sources(weights))
    if cache is not None and not differentiable and not exporting():
        kept = cache.get(weights, FoldSettings(_compute_dtype(x), spec.scale, spec.candidate_input))
        return rethink_folded(x, weights, spec, backend, kept)
    if spec.rounds == 1 or (fold == "auto" and not _pays(x, weights, spec)):
        return rethink_literal(x, weights, spec, backend)
    return rethink_folded(x, weights, spec, backend)


def check_spec(spec: RethinkingSpec, weights: LayerWeights) -> None:
    """`ValueError` for settings that no layer can run with."""
    get_activation(spec.activation)
    if spec.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {spec.rounds}")
    if spec.rounds > 1 and weights.gru is None:
        raise ValueError(f"rounds={spec.rounds} needs GRU weights; there are none (rounds=1 needs none)")
    if spec.candidate_input not in CANDIDATE_INPUTS:
        raise ValueError(
            f"unknown candidate_input {spec.candidate_input!r}; expected 'expert_output' or 'hidden_state'"
        )
    if spec.candidate_activation not in CANDIDATE_ACTIVATIONS:
        raise ValueError(f"unknown candidate_activation {spec.candidate_activation!r}; expected 'sigmoid' or 'tanh'")
    experts = weights.experts.gate_A.shape[0]
    if weights.router is None and experts != 1:
        raise ValueError(f"{experts} experts need a router; without one there can be one expert")
    if not 0 <= spec.dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {spec.dropout}")


def check_input(x: Tensor, weights: LayerWeights) -> None:
    """`TypeError` or `ValueError` for an x that is no batch of hidden states for this layer."""
    hidden, device = weights.experts.gate_A.shape[2], weights.experts.gate_A.device
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x must be [tokens, {hidden}], got {list(x.shape)}; flatten a batch first")
    if x.device != device:
        raise ValueError(f"x is on {x.device}, the experts on {device}; put them on one device")


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
    hidden, intermediate = weights.experts.gate_A.shape[2], weights.experts.gate_B.shape[1]
    dora = weights.experts.magnitudes is not None
    return fold_break_even(hidden, intermediate, padded(weights.gru.width), spec.rounds, dora)


__all__ = [
    "CANDIDATE_INPUTS",
    "FOLD_MODES",
    "BaseMLP",
    "DenseMLP",
    "ExpertWeights",
    "Fold",
    "FoldCache",
    "FoldSettings",
    "GRUWeights",
    "LayerWeights",
    "LinearRouters",
    "RethinkingOutput",
    "RethinkingSpec",
    "build_fold",
    "fold_break_even",
    "rethink",
    "rethink_folded",
    "rethink_literal",
    "rethink_reference",
]
