"""The expert round without checks and casts, for callers whose operands are right already: the recurrence's rounds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphmoe_kernels.experts import reference
from graphmoe_kernels.experts.op import BACKENDS, expert_swiglu_op
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp, Inputs, LowRankUpdate, Settings
from graphmoe_kernels.registration import seen_from_outside


def run_experts(operands: ExpertOperands, scale: float, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    """Return hidden [N, F] and low_down [N, n*r] of a round of experts; see `graphmoe_kernels.expert_swiglu`.

    All but routing weights and scale vectors are in the dtype of the pre-activations, and autocast is off.

    Args:
        operands: as `graphmoe_kernels.expert_swiglu` has checked and cast them.
        scale: s = alpha / r.
        activation: a name of `graphmoe_kernels.ACTIVATIONS`.
        backend: ``"triton"``, ``"torch"`` or ``"reference"``.
    """
    o = operands
    state, fold_gate, fold_up = o.update or (None, None, None)
    gate_scale, up_scale = o.scales or (None, None)
    gate_bias, up_bias = o.biases or (None, None)
    rate, seed = o.dropout or (0.0, None)
    inputs = Inputs(
        *o.pre_activations, state, fold_gate, fold_up, o.low, o.low_update, *o.B, o.down_A, gate_scale, up_scale,
        o.routing_weights, o.expert_ids,
    )  # fmt: skip
    settings = Settings(scale, activation, rate, gate_bias, up_bias, seed, o.token_order)
    return _run(inputs, settings, backend)


def run_swiglu(pre_activations: GateUp, update: LowRankUpdate | None, activation: str, backend: str) -> Tensor:
    """Return act(g) * u, [N, F], of pre-activations and an update of low rank; see `graphmoe_kernels.swiglu`."""
    gate = pre_activations.gate
    tokens, width = gate.shape
    B, low = gate.new_empty(1, width, 0), gate.new_empty(tokens, 0)
    weights = gate.new_ones(tokens, 1)
    ids = weights.new_zeros(tokens, 1, dtype=weights.dtype).int()
    operands = ExpertOperands(pre_activations, low, GateUp(B, B), B.mT, weights, ids, update=update)
    return run_experts(operands, 1.0, activation, backend)[0]


def _run(inputs: Inputs, settings: Settings, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.expert_swiglu(inputs, settings)
    if seen_from_outside(*inputs, settings.gate_bias, settings.up_bias, settings.seed, settings.order):
        found: Any = expert_swiglu_op(*inputs, *settings, backend)
        return found
    return BACKENDS[backend].forward(inputs, settings)
