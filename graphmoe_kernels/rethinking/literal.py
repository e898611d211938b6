"""Self-rethinking round by round: x_t is formed and everything runs again on it (Algorithm 1, by operators).

This is the loop to use where folding does not pay (few tokens in training) and the baseline that folding is measured
against. It already combines the experts before the down projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.gru import gru_step
from graphmoe_kernels.rethinking import rounds
from graphmoe_kernels.rethinking.weights import LayerWeights, RethinkingOutput, RethinkingSpec


def rethink_literal(
    x: Tensor, weights: LayerWeights, spec: RethinkingSpec, token_mask: Tensor | None = None, backend: str = "auto"
) -> RethinkingOutput:
    """y_T for x [N, D] by the literal loop; arguments as in `graphmoe_kernels.rethink`."""
    base, router, experts, gru = weights
    state, total, routings = None, None, []
    for t in range(spec.rounds):
        routing = rounds.route(rounds.router_logits(x, router), spec, token_mask, backend)
        routings.append(routing)
        gate, up = base.project_in(x)
        dropped = F.dropout(x.to(gate.dtype), spec.dropout)
        low_gate, low_up = rounds.low_rank(dropped, experts.gate_A), rounds.low_rank(dropped, experts.up_A)
        c, z = rounds.expert_round(gate, up, low_gate, low_up, experts, routing, spec, backend)
        y = rounds.output(base, c, z, experts, routing, spec)
        if t == spec.rounds - 1:
            break
        assert gru is not None
        columns = gru.input_columns().to(y.dtype)  # [3G, D]
        if spec.candidate_input == "expert_output":
            inputs = F.linear(y, columns)
        else:
            width = gru.width
            reads_y, reads_x = columns[: 2 * width], columns[2 * width :]
            inputs = torch.cat([F.linear(y, reads_y), F.linear(x.to(y.dtype), reads_x)], dim=1)
        recurrent = None if state is None else F.linear(state, gru.recurrent_gates().to(state.dtype))
        joined = gru_step(
            inputs,
            recurrent,
            state,
            total,
            gru.recurrent_candidate(),
            gru.candidate_bias,
            candidate_activation=spec.candidate_activation,
            backend=backend,
        )
        state, total = joined.chunk(2, dim=1)  # [N, G] each
        x = x + F.linear(state, gru.output.to(state.dtype))
    return rounds.collect(y, routings)
