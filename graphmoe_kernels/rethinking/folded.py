"""Self-rethinking with the folds: the base projections run once, a later round is low-rank work only."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.experts.operands import GateUp, LowRankUpdate
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.call import Call, GRUState
from graphmoe_kernels.rethinking.checks import checked_call
from graphmoe_kernels.rethinking.folding import Fold, FoldSettings, RoundsFold, build_fold
from graphmoe_kernels.rethinking.kinds import LayerWeights, RoundInputs
from graphmoe_kernels.rethinking.weights import RethinkingOutput, RethinkingSpec, collect


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
    return folded_rounds(x, weights, checked_call(x, weights, spec, backend), fold)


def folded_rounds(x: Tensor, weights: LayerWeights, call: Call, fold: Fold | None = None) -> RethinkingOutput:
    """`rethink_folded` of arguments that were checked."""
    base, spec = weights.base, call.spec
    # Before the cast to the projections' dtype: autocast would lower the router's input.
    first = routing = weights.experts.route(x, call)
    with named_range("mlp"):
        pre_activations = GateUp(*base.project_in(x))  # [N, F] each, read by every round
    if x.dtype is not pre_activations.gate.dtype:
        x = x.to(pre_activations.gate.dtype)
    if fold is None:
        fold = build_fold(weights, FoldSettings(x.dtype, spec.scale, spec.candidate_input))
    experts = fold.experts
    pre_activations = experts.read(pre_activations)
    with named_range("experts"):
        low = F.linear(call.drop(x), experts.low_A)  # [N, 2nr]
    out = experts.round(RoundInputs(pre_activations, low), routing, call)
    logits, state, total = [out.logits], None, None
    later = fold.later
    for _ in range(1, spec.rounds):
        assert later is not None
        with named_range("gru"):
            gru_inputs = later.read(out, x, total, base, experts.down)
            state = gru_round(gru_inputs, state, later, call)
        del out  # before the next one is made: the widest tensor of a round
        total = state.gru.total
        routing = weights.experts.route_later(later.routers, total, first, call)
        low_t, low_update = low, state.low_update
        if call.spec.dropout > 0:  # dropout(x_t) is not linear in x_t: form x_t, for A alone
            with named_range("experts"):
                low_t, low_update = F.linear(call.drop(x + F.linear(total, later.output)), experts.low_A), None
        inputs = RoundInputs(pre_activations, low_t, LowRankUpdate(total, *later.update), low_update)
        out = experts.round(inputs, routing, call)
        logits.append(out.logits)
    return collect(experts.down.output(base, out), logits)


class RoundState(NamedTuple):
    """What a GRU step leaves to the next round; all are columns of two tensors.

    Attributes:
        gru: what the next step reads, of width G'.
        low_update: (A W_g) H, [N, 2nr], what the round's experts read.
    """

    gru: GRUState
    low_update: Tensor | None


def gru_round(gru_inputs: Tensor, state: RoundState | None, fold: RoundsFold, call: Call) -> RoundState:
    """One GRU step on ``gru_inputs`` [N, 3G'], and the product that reads h and H for the round after it."""
    before = None if state is None else state.gru
    state_and_total = call.gru_step(gru_inputs, before, fold.candidate_weight, fold.candidate_bias)  # [N, 2G']
    last, total = state_and_total.split_with_sizes(fold.state_widths, dim=1)
    low_update, recurrent = F.linear(state_and_total, fold.reread).split_with_sizes(fold.reread_widths, dim=1)
    return RoundState(GRUState(recurrent, last, total), low_update)
