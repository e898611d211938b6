"""Operators for mixture-of-LoRA-experts layers with self-rethinking (GraphMoE): exact, folded, differentiable.

Importing this package needs neither a GPU nor Triton and looks for no device.
"""

from graphmoe_kernels.activations import ACTIVATIONS, get_activation, register_activation
from graphmoe_kernels.experts import Dropout, ExpertOperands, GateUp, LowRankUpdate, expert_swiglu, swiglu
from graphmoe_kernels.gru import gru_step
from graphmoe_kernels.rethinking import (
    BaseMLP,
    DenseMLP,
    ExpertWeights,
    Fold,
    FoldCache,
    FoldSettings,
    GRUWeights,
    LayerWeights,
    LinearRouters,
    RethinkingOutput,
    RethinkingSpec,
    build_fold,
    fold_break_even,
    rethink,
    rethink_folded,
    rethink_literal,
    rethink_reference,
)
from graphmoe_kernels.routing import Routing, expert_order, route_tokens, topk_softmax_routing

__all__ = [
    "ACTIVATIONS",
    "BaseMLP",
    "DenseMLP",
    "Dropout",
    "ExpertOperands",
    "ExpertWeights",
    "Fold",
    "FoldCache",
    "FoldSettings",
    "GRUWeights",
    "GateUp",
    "LayerWeights",
    "LinearRouters",
    "LowRankUpdate",
    "RethinkingOutput",
    "RethinkingSpec",
    "Routing",
    "build_fold",
    "expert_order",
    "expert_swiglu",
    "fold_break_even",
    "get_activation",
    "gru_step",
    "register_activation",
    "rethink",
    "rethink_folded",
    "rethink_literal",
    "rethink_reference",
    "route_tokens",
    "swiglu",
    "topk_softmax_routing",
]
