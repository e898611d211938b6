"""The expert operators without checks and casts, for callers whose operands are right already: a recurrence's rounds.

What is not seen from outside (`graphmoe_kernels.registration`) goes straight to its implementation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphmoe_kernels.experts import reference
from graphmoe_kernels.experts.op import EXPERTS, SWIGLU, expert_swiglu_op, flatten, flatten_shared, swiglu_op
from graphmoe_kernels.experts.operands import ExpertOperands, ExpertsOutput, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton import launch
from graphmoe_kernels.registration import seen_from_outside


def run_experts(
    operands: ExpertOperands, scale: float, activation: str, backend: str, *, unseen: bool = False
) -> tuple[Tensor, Tensor]:
    """Return hidden [N, F] and low_down [N, n*r] of a round of experts; see `graphmoe_kernels.expert_swiglu`.

    Args:
        operands: as `graphmoe_kernels.expert_swiglu` has checked and cast them: all but routing weights and scale
            vectors in the dtype of the pre-activations. Autocast is off.
        scale: s = alpha / r.
        activation: a name of `graphmoe_kernels.ACTIVATIONS`.
        backend: ``"triton"``, ``"torch"`` or ``"reference"``.
        unseen: it is known that nobody looks on (`graphmoe_kernels.registration.unseen`).
    """
    if backend == "reference":
        return reference.expert_swiglu(operands, scale, activation)
    if not unseen and seen_from_outside(*operands.floating(), *operands.constants()):
        found: Any = expert_swiglu_op(*flatten(operands), scale, activation, backend)
        return found
    return EXPERTS[backend].forward(operands, scale, activation)


def run_round(
    operands: ExpertOperands, scale: float, activation: str, backend: str, *, unseen: bool = False
) -> ExpertsOutput:
    """Return what `run_experts` does, few tokens' side by side where the kernels write it so and nobody looks on.

    (The outputs of a registered operator must not share memory.)
    """
    if unseen and backend == "triton":
        return launch.forward_beside(operands, scale, activation)
    return ExpertsOutput(*run_experts(operands, scale, activation, backend, unseen=unseen))


def run_swiglu(
    pre_activations: GateUp, update: LowRankUpdate | None, activation: str, backend: str, *, unseen: bool = False
) -> Tensor:
    """Return act(g) * u, [N, F], without experts; see `graphmoe_kernels.swiglu`. Arguments as in `run_experts`."""
    if backend == "reference":
        return reference.swiglu(pre_activations, update, activation)
    if not unseen:
        flat = flatten_shared(pre_activations, update)
        if seen_from_outside(*flat):
            found: Any = swiglu_op(*flat, activation, backend)
            return found
    return SWIGLU[backend].swiglu(pre_activations, update, activation)
