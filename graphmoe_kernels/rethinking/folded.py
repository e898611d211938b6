"""Self-rethinking with the folds: the base projections run once, a later round is low-rank work only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.gru import gru_step
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking import rounds
from graphmoe_kernels.rethinking.folding import Fold, FoldSettings, RoundsFold, build_fold
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
    base = weights.base
    routing = rounds.route(x, weights.router, spec, token_mask, backend)  # before the cast: autocast would lower it
    gate, up = rounds.project_in(base, x)  # [N, F] each, read by every round
    x = x.to(gate.dtype)
    if fold is None:
        fold = build_fold(weights, FoldSettings(gate.dtype, spec.scale, spec.candidate_input))
    experts, order = fold.experts, rounds.token_order(routing, gate, backend)

    low = rounds.project_low(x, experts, spec)  # [N, 2nr]
    c, z = rounds.expert_round(gate, up, low, experts, routing, spec, backend, order)
    routings, state = [routing], None
    for _ in range(1, spec.rounds):
        assert fold.later is not None
        with named_range("gru"):
            state = _think(c, z, x, state, routing, spec, fold.later, backend)
        del c  # before the next one is made: the widest tensor of a round
        total = state.total
        routing = rounds.route(total, fold.later.router, spec, token_mask, backend, offset=routings[0].logits)
        routings.append(routing)
        low_t, low_update = low, state.low_update if spec.dropout == 0 else None
        if spec.dropout > 0:  # dropout(x_t) is not linear in x_t: form x_t, for A alone
            x_t = x + F.linear(total, fold.later.output)
            low_t = rounds.project_low(x_t, experts, spec)
        update = (total, fold.later.gate, fold.later.up)
        c, z = rounds.expert_round(gate, up, low_t, experts, routing, spec, backend, order, update, low_update)
    return rounds.collect(rounds.output(base, c, z, experts.down_B, routing, spec), routings)


class State(NamedTuple):
    """What a GRU step leaves to the next round; all are columns of two tensors.

    Attributes:
        last, total: h and the sum H of all states so far, [N, G'] each.
        low_update: (A W_g) H, [N, 2nr].
        recurrent: W_z h beside W_r h, [N, 2G'], for the next step.
    """

    last: Tensor
    total: Tensor
    low_update: Tensor
    recurrent: Tensor


def _think(
    c: Tensor,
    z: Tensor,
    x: Tensor,
    state: State | None,
    routing: Routing,
    spec: RethinkingSpec,
    fold: RoundsFold,
    backend: str,
) -> State:
    """One GRU step on a round's c and z, and the product that reads h and H for the round after it."""
    pair = gru_step(
        _gru_inputs(c, z, x, state, routing, spec, fold),
        None if state is None else state.recurrent,
        None if state is None else state.last,
        None if state is None else state.total,
        fold.candidate_weight,
        fold.candidate_bias,
        candidate_activation=spec.candidate_activation,
        backend=backend,
    )
    width = pair.shape[1] // 2
    reread = F.linear(pair, fold.reread)  # [N, 2nr + 2G']
    low_update, recurrent = reread[:, : -2 * width], reread[:, -2 * width :]
    return State(pair[:, :width], pair[:, width:], low_update, recurrent)


def _gru_inputs(
    c: Tensor, z: Tensor, x: Tensor, state: State | None, routing: Routing, spec: RethinkingSpec, fold: RoundsFold
) -> Tensor:
    """The GRU's input [N, 3G'] from c and z, without a down projection."""
    inputs = rounds.add_product(F.linear(c, fold.inputs), z, fold.inputs_low)
    if fold.inputs_bias is not None:
        mixed = rounds.mixed_weight(routing, spec, inputs.dtype)
        inputs = inputs + (fold.inputs_bias if mixed is None else mixed * fold.inputs_bias)
    if fold.candidate_x is None or fold.candidate_state is None:
        return inputs
    candidate = F.linear(x, fold.candidate_x)
    if state is not None:
        candidate = rounds.add_product(candidate, state.total, fold.candidate_state)
    return torch.cat([inputs, candidate], dim=1)
