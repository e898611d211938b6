"""A round of SwiGLU experts as one operator: base pre-activation, experts' low-rank terms, activation, combination.

`api` has the public functions, `run` the same without checks; `reference`, `pytorch` and `triton` compute, and `op`
registers with torch.
"""

from graphmoe_kernels.experts.api import expert_swiglu, swiglu
from graphmoe_kernels.experts.operands import Dropout, ExpertOperands, GateUp, LowRankUpdate

__all__ = ["Dropout", "ExpertOperands", "GateUp", "LowRankUpdate", "expert_swiglu", "swiglu"]
