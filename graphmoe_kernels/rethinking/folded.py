"""Self-rethinking with the folds: the base projections run once, a later round is low-rank work only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.gru import gru_step
from graphmoe_kernels.rethinking import rounds
from graphmoe_kernels.rethinking.folding import Fold, FoldSettings, build_fold
from graphmoe_kernels.rethinking.weights import LayerWeights, RethinkingOutput, RethinkingSpec
from graphmoe_kernels.routing import Routing


def rethink_folded(
    x: Tensor,
    weights: LayerWeights,
    spec: RethinkingSpec,
    token_mask: Tensor | None = None,
    backend: str = "auto",
    fold: Fold | None = None,
) -> RethinkingOutput:
    """y_T for x [N, D], equal to `rethink_literal` in real arithmetic; arguments as in `graphmoe_kernels.rethink`.

    Without a ``fold`` it is built here, inside the autograd graph.
    """
    base, router, experts, _ = weights
    logits_1 = rounds.router_logits(x, router)  # before the cast: autocast does not lower what the router reads
    gate, up = base.project_in(x)  # [N, F] each, read by every round
    x = x.to(gate.dtype)
    if fold is None and spec.rounds > 1:
        fold = build_fold(weights, FoldSettings(gate.dtype, spec.scale, spec.candidate_input))

    dropped = F.dropout(x, spec.dropout)
    low_1 = rounds.low_rank(dropped, experts.gate_A), rounds.low_rank(dropped, experts.up_A)
    candidate_1 = F.linear(x, fold.candidate_x) if fold is not None and fold.candidate_x is not None else None

    routing = rounds.route(logits_1, spec, token_mask, backend)
    routings = [routing]
    c, z = rounds.expert_round(gate, up, *low_1, experts, routing, spec, backend)
    state, total = None, None
    for _ in range(1, spec.rounds):
        assert fold is not None
        inputs = _gru_inputs(c, z, routing, candidate_1, total, spec, fold)
        recurrent = None if state is None else F.linear(state, fold.recurrent_gates)
        joined = gru_step(
            inputs,
            recurrent,
            state,
            total,
            fold.recurrent_candidate,
            fold.candidate_bias,
            candidate_activation=spec.candidate_activation,
            backend=backend,
        )
        state, total = joined.chunk(2, dim=1)  # h and H, [N, G'] each
        logits = logits_1 + rounds.router_logits(total, fold.router)
        routing = rounds.route(logits, spec, token_mask, backend)
        routings.append(routing)
        if spec.dropout > 0:  # dropout(x_t) is not linear in x_t: form x_t, for A alone
            dropped = F.dropout(x + F.linear(total, fold.output), spec.dropout)
            low = rounds.low_rank(dropped, experts.gate_A), rounds.low_rank(dropped, experts.up_A)
        else:
            low = low_1[0] + F.linear(total, fold.low_gate), low_1[1] + F.linear(total, fold.low_up)
        update = (total, fold.gate, fold.up)
        c, z = rounds.expert_round(gate, up, *low, experts, routing, spec, backend, update)
    return rounds.collect(rounds.output(base, c, z, experts, routing, spec), routings)


def _gru_inputs(
    c: Tensor,
    z: Tensor,
    routing: Routing,
    candidate_1: Tensor | None,
    total: Tensor | None,
    spec: RethinkingSpec,
    fold: Fold,
) -> Tensor:
    """The GRU's input [N, 3G'] from c and z, without a down projection."""
    inputs = F.linear(c, fold.inputs) + F.linear(z, fold.inputs_low)
    if fold.inputs_bias is not None:
        mixed = rounds.mixed_weight(routing, spec, inputs.dtype)
        inputs = inputs + (fold.inputs_bias if mixed is None else mixed * fold.inputs_bias)
    if candidate_1 is None:
        return inputs
    candidate = candidate_1
    if total is not None and fold.candidate_state is not None:
        candidate = candidate + F.linear(total, fold.candidate_state)
    return torch.cat([inputs, candidate], dim=1)
