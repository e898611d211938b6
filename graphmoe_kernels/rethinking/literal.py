"""Self-rethinking round by round: x_t is formed and everything runs again on it (Algorithm 1, by operators).

This is the loop to use where folding does not pay (few tokens in training) and the baseline that folding is measured
against. It already combines the experts before the down projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.gru import gru_step
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking import rounds
from graphmoe_kernels.rethinking.checks import check_call
from graphmoe_kernels.rethinking.prepared import prepare_experts
from graphmoe_kernels.rethinking.round_routing import RoundSettings, route
from graphmoe_kernels.rethinking.weights import GRUWeights, LayerWeights, RethinkingOutput, RethinkingSpec


def rethink_literal(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, backend: str = "auto") -> RethinkingOutput:
    """y_T for x [N, D] by the literal loop; arguments and errors as in `graphmoe_kernels.rethink`."""
    check_call(x, weights, spec, backend)
    return literal_rounds(x, weights, spec, backend)


def literal_rounds(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, backend: str) -> RethinkingOutput:
    """`rethink_literal` of arguments that were checked."""
    base, gru, router, down_router = weights.base, weights.gru, weights.input_router(), weights.down_router
    settings = RoundSettings(spec, backend)
    experts, pair, routings = None, None, []
    for t in range(spec.rounds):
        routing = route(x, router, down_router is not None, settings)
        gate, up = rounds.project_in(base, x)
        if experts is None:
            with named_range("experts"):
                experts = prepare_experts(weights, gate.dtype, spec.scale)
        low = rounds.project_low(x.to(gate.dtype), experts, spec)  # [N, 2nr]
        inputs = rounds.RoundInputs(*rounds.without_bias(gate, up, experts), low)
        out = rounds.expert_round(inputs, experts, routing, down_router, settings)
        routings.append(out.routings)
        y = rounds.output(base, out, experts, routing, spec)
        if t == spec.rounds - 1:
            break
        assert gru is not None
        with named_range("gru"):
            pair = _gru_round(x, y, pair, gru, spec, backend)
            x = x + F.linear(pair[:, : gru.width], gru.output.to(pair.dtype))
    return rounds.collect(y, routings)


def _gru_round(
    x: Tensor, y: Tensor, pair: Tensor | None, gru: GRUWeights, spec: RethinkingSpec, backend: str
) -> Tensor:
    """h and the sum of all states side by side, [N, 2G], from those of the round before."""
    columns, width = gru.input_columns().to(y.dtype), gru.width  # [3G, D]
    if spec.candidate_input == "expert_output":
        inputs = F.linear(y, columns)
    else:
        reads_y, reads_x = columns[: 2 * width], columns[2 * width :]
        inputs = torch.cat([F.linear(y, reads_y), F.linear(x.to(y.dtype), reads_x)], dim=1)
    state = total = recurrent = None
    if pair is not None:
        state, total = pair[:, :width], pair[:, width:]
        recurrent = F.linear(state, gru.recurrent_gates().to(pair.dtype))  # [N, 2G]
    return gru_step(
        inputs,
        recurrent,
        state,
        total,
        gru.recurrent_candidate(),
        gru.candidate_bias,
        candidate_activation=spec.candidate_activation,
        backend=backend,
    )
