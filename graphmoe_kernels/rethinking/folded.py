"""Self-rethinking with the folds: the base projections run once, a later round is low-rank work only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.gru import gru_step
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking import rounds
from graphmoe_kernels.rethinking.checks import check_call
from graphmoe_kernels.rethinking.folding import Fold, FoldSettings, RoundsFold, build_fold
from graphmoe_kernels.rethinking.round_routing import (
    RoundRouting,
    RoundSettings,
    mixed_weight,
    route,
)
from graphmoe_kernels.rethinking.weights import LayerWeights, RethinkingOutput, RethinkingSpec


def rethink_folded(
    x: Tensor,
    weights: LayerWeights,
    spec: RethinkingSpec,
    backend: str = "auto",
    fold: Fold | None = None,
) -> RethinkingOutput:
    """y_T for x [N, D], equal to `rethink_literal` in real arithmetic; arguments and errors as in
    `graphmoe_kernels.rethink`.

    Without a ``fold`` it is built here, inside the autograd graph.
    """
    check_call(x, weights, spec, backend)
    return folded_rounds(x, weights, spec, backend, fold)


def folded_rounds(
    x: Tensor,
    weights: LayerWeights,
    spec: RethinkingSpec,
    backend: str,
    fold: Fold | None = None,
) -> RethinkingOutput:
    """`rethink_folded` of arguments that were checked."""
    base, down_router = weights.base, weights.down_router
    mixed, settings = down_router is not None, RoundSettings(spec, backend)
    # Before the cast to the projections' dtype: autocast would lower the router's input.
    first = routing = route(x, weights.input_router(), mixed, settings)
    gate, up = rounds.project_in(base, x)  # [N, F] each, read by every round
    x = x.to(gate.dtype)
    if fold is None:
        fold = build_fold(weights, FoldSettings(gate.dtype, spec.scale, spec.candidate_input))
    experts = fold.experts
    gate, up = rounds.without_bias(gate, up, experts)

    low = rounds.project_low(x, experts, spec)  # [N, 2nr]
    out = rounds.expert_round(rounds.RoundInputs(gate, up, low), experts, routing, down_router, settings)
    routings, state = [out.routings], None
    for _ in range(1, spec.rounds):
        later = fold.later
        assert later is not None
        with named_range("gru"):
            reads = _gru_inputs(out, x, state, routing, weights, fold, spec)
            state = _think(reads, state, later, spec, backend)
        del out  # before the next one is made: the widest tensor of a round
        total = state.total
        routing = route(total, later.router, mixed, settings, before=first)
        low_t, low_update = low, state.low_update if spec.dropout == 0 else None
        if spec.dropout > 0:  # dropout(x_t) is not linear in x_t: form x_t, for A alone
            low_t = rounds.project_low(x + F.linear(total, later.output), experts, spec)
        inputs = rounds.RoundInputs(gate, up, low_t, (total, later.gate, later.up), low_update)
        out = rounds.expert_round(inputs, experts, routing, down_router, settings)
        routings.append(out.routings)
    return rounds.collect(rounds.output(base, out, experts, routing, spec), routings)


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


def _think(reads: Tensor, state: State | None, fold: RoundsFold, spec: RethinkingSpec, backend: str) -> State:
    """One GRU step on what it ``reads`` [N, 3G'], and the product that reads h and H for the round after it."""
    pair = gru_step(
        reads,
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
    out: rounds.RoundOutput,
    x: Tensor,
    state: State | None,
    routing: RoundRouting,
    weights: LayerWeights,
    fold: Fold,
    spec: RethinkingSpec,
) -> Tensor:
    """The GRU's input [N, 3G'] from a round's experts: without a down projection, unless DoRA scales what it gives."""
    later = fold.later
    assert later is not None
    if later.inputs_low is None:
        inputs = F.linear(rounds.output(weights.base, out, fold.experts, routing, spec), later.inputs)
    else:
        inputs = rounds.add_product(F.linear(out.c[0], later.inputs), out.z, later.inputs_low)
    if later.inputs_bias is not None:
        mixed = mixed_weight(routing, spec, inputs.dtype)
        inputs = inputs + (later.inputs_bias if mixed is None else mixed * later.inputs_bias)
    if later.candidate_x is None or later.candidate_state is None:
        return inputs
    candidate = F.linear(x, later.candidate_x)
    if state is not None:
        candidate = rounds.add_product(candidate, state.total, later.candidate_state)
    return torch.cat([inputs, candidate], dim=1)
