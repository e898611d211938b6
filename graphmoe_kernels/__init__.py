"""Operators for mixture-of-LoRA-experts layers with self-rethinking (GraphMoE): exact, folded, differentiable.

What other packages use is exported here, and the cost model by `graphmoe_kernels.cost`. Importing this package needs
neither a GPU nor Triton and looks for no device.
"""

from graphmoe_kernels.activations import ACTIVATIONS, ALIASES, get_activation, register_activation
from graphmoe_kernels.backend import check_backend
from graphmoe_kernels.dora import row_norms
from graphmoe_kernels.experts import Dropout, ExpertOperands, GateUp, LowRankUpdate, expert_swiglu, swiglu
from graphmoe_kernels.gru import CANDIDATE_ACTIVATIONS, gru_step
from graphmoe_kernels.mixed_linear import LinearExperts, PreparedLinear, mix_linear, prepare_linear
from graphmoe_kernels.ranges import RANGE_PREFIX, named_range, recorded_ranges
from graphmoe_kernels.rethinking import rethink
from graphmoe_kernels.rethinking.cache import FoldCache, fold_sources
from graphmoe_kernels.rethinking.checks import CANDIDATE_INPUTS
from graphmoe_kernels.rethinking.chosen import ChosenExperts, SingleExpert
from graphmoe_kernels.rethinking.folded import rethink_folded
from graphmoe_kernels.rethinking.folding import Fold, FoldSettings, build_fold
from graphmoe_kernels.rethinking.kinds import ExpertKind, LayerWeights
from graphmoe_kernels.rethinking.literal import rethink_literal
from graphmoe_kernels.rethinking.mixed import MixedExperts
from graphmoe_kernels.rethinking.policy import FOLD_MODES, fold_break_even
from graphmoe_kernels.rethinking.reference import rethink_reference
from graphmoe_kernels.rethinking.weights import (
    BaseMLP,
    DenseMLP,
    ExpertWeights,
    GRUWeights,
    LinearRouters,
    Magnitudes,
    RethinkingOutput,
    RethinkingSpec,
    RouterSettings,
)
from graphmoe_kernels.routing import Routing, route_tokens, topk_softmax_routing
from graphmoe_kernels.validation import FLOAT_DTYPES, shown

__all__ = [
    "ACTIVATIONS",
    "ALIASES",
    "CANDIDATE_ACTIVATIONS",
    "CANDIDATE_INPUTS",
    "FLOAT_DTYPES",
    "FOLD_MODES",
    "RANGE_PREFIX",
    "BaseMLP",
    "ChosenExperts",
    "DenseMLP",
    "Dropout",
    "ExpertKind",
    "ExpertOperands",
    "ExpertWeights",
    "Fold",
    "FoldCache",
    "FoldSettings",
    "GRUWeights",
    "GateUp",
    "LayerWeights",
    "LinearExperts",
    "LinearRouters",
    "LowRankUpdate",
    "Magnitudes",
    "MixedExperts",
    "PreparedLinear",
    "RethinkingOutput",
    "RethinkingSpec",
    "RouterSettings",
    "Routing",
    "SingleExpert",
    "build_fold",
    "check_backend",
    "expert_swiglu",
    "fold_break_even",
    "fold_sources",
    "get_activation",
    "gru_step",
    "mix_linear",
    "named_range",
    "prepare_linear",
    "recorded_ranges",
    "register_activation",
    "rethink",
    "rethink_folded",
    "rethink_literal",
    "rethink_reference",
    "route_tokens",
    "row_norms",
    "shown",
    "swiglu",
    "topk_softmax_routing",
]
