"""Self-rethinking round by round: x_t is formed and everything runs again on it (Algorithm 1, by operators).

This is the loop to use where folding does not pay (few tokens in training) and the baseline that folding is measured
against. It already combines the experts before the down projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.experts.operands import GateUp
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.call import Call, GRUState
from graphmoe_kernels.rethinking.checks import checked_call
from graphmoe_kernels.rethinking.folding import cast_experts
from graphmoe_kernels.rethinking.kinds import CastExperts, LayerWeights, RoundInputs
from graphmoe_kernels.rethinking.weights import PaddedGRU, RethinkingOutput, RethinkingSpec, collect


def rethink_literal(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, backend: str = "auto") -> RethinkingOutput:
    """y_T for x [N, D] by the literal loop; arguments and errors as in `graphmoe_kernels.rethink`."""
    return literal_rounds(x, weights, checked_call(x, weights, spec, backend))


def literal_rounds(x: Tensor, weights: LayerWeights, call: Call) -> RethinkingOutput:
    """`rethink_literal` of arguments that were checked."""
    base, spec = weights.base, call.spec
    experts: CastExperts | None = None
    gru: PaddedGRU | None = None
    state, logits = None, []
    for t in range(spec.rounds):
        routing = weights.experts.route(x, call)
        with named_range("mlp"):
            pre_activations = GateUp(*base.project_in(x))  # [N, F] each
        dtype = pre_activations.gate.dtype
        with named_range("experts"):
            if experts is None:
                experts = cast_experts(weights, dtype, spec.scale)
            low = F.linear(call.drop(x.to(dtype)), experts.low_A)  # [N, 2nr]
        out = experts.round(RoundInputs(experts.read(pre_activations), low), routing, call)
        logits.append(out.logits)
        y = experts.down.output(base, out)
        if t == spec.rounds - 1:
            break
        with named_range("gru"):
            if gru is None:
                assert weights.gru is not None
                gru = weights.gru.padded().cast(dtype)
            state = gru_round(x, y, state, gru, call)
            x = x + F.linear(state[:, : gru.width], gru.output)
    return collect(y, logits)


def gru_round(x: Tensor, y: Tensor, state_and_total: Tensor | None, gru: PaddedGRU, call: Call) -> Tensor:
    """h and the sum of all states side by side, [N, 2G'], from those of the round before."""
    columns, width = gru.input_columns, gru.width
    if call.spec.candidate_input == "expert_output":
        gru_inputs = F.linear(y, columns)
    else:
        reads_y, reads_x = columns[: 2 * width], columns[2 * width :]
        gru_inputs = torch.cat([F.linear(y, reads_y), F.linear(x.to(y.dtype), reads_x)], dim=1)
    before = None
    if state_and_total is not None:
        last, total = state_and_total[:, :width], state_and_total[:, width:]
        before = GRUState(F.linear(last, gru.recurrent_gates), last, total)  # W_z h, W_r h: [N, 2G']
    return call.gru_step(gru_inputs, before, gru.recurrent_candidate, gru.candidate_bias)
