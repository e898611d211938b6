"""The steps that the literal and the folded recurrence share: one round of experts, and the output.

Experts are chosen or mixed. Chosen experts are whole MLPs (one router, k slots a token, each slot one expert). Mixed
experts belong to a linear, whose own router weighs them (two routers read x, one reads c): once their low-rank
activations are multiplied with the routing weights, B is the same for all tokens, and the operator takes it as an
update that they share. Without a router there is one expert, chosen by all.

DoRA multiplies what W and B give by a vector for every expert. Inside the operator where a slot has one expert; around
it where it has a mixture, and around the base down projection, which then runs once a slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.dora import scaled_by
from graphmoe_kernels.experts import Dropout, ExpertOperands, GateUp, LowRankUpdate, expert_swiglu, swiglu
from graphmoe_kernels.mixing import mixed_change, mixing_weights, weighted
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.prepared import PreparedExperts
from graphmoe_kernels.rethinking.round_routing import (
    RoundRouting,
    RoundSettings,
    mixed_weight,
    route_one,
    token_order,
)
from graphmoe_kernels.rethinking.weights import BaseMLP, RethinkingOutput, RethinkingSpec
from graphmoe_kernels.routing import Routing


class RoundOutput(NamedTuple):
    """A round's experts before the down projection.

    Attributes:
        c: what the base down projection reads, [N, F] each: all slots together, or with DoRA one by one.
        z: [N, n*r], what B of the down projection reads.
        down_changes: with DoRA one for each c: by how much more than once its base projection counts, [N, D]. Else ().
        routings: of all routers, in the order of `LayerWeights.routers`.
    """

    c: tuple[Tensor, ...]
    z: Tensor
    down_changes: tuple[Tensor, ...]
    routings: tuple[Routing, ...]


class RoundInputs(NamedTuple):
    """What a round's experts read.

    Attributes:
        gate, up: [N, F], the base pre-activations (`without_bias`); those of round 1 in a folded round.
        low: [N, 2nr], `project_low` of the same x.
        update: H, M_gate and M_up of a folded round, as `RoundsFold` has them.
        low_update: [N, 2nr], (A W_g) H of a folded round.
    """

    gate: Tensor
    up: Tensor
    low: Tensor
    update: tuple[Tensor, Tensor, Tensor] | None = None
    low_update: Tensor | None = None


def draw_seed(spec: RethinkingSpec, device: torch.device) -> Tensor | None:
    """A fresh dropout seed from the device's generator, or None without dropout."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device) if spec.dropout > 0 else None


def project_in(base: BaseMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """The frozen projections' gate and up pre-activations, [N, F] each."""
    with named_range("mlp"):
        return base.project_in(x)


def without_bias(gate: Tensor, up: Tensor, experts: PreparedExperts) -> tuple[Tensor, Tensor]:
    """What `expert_round` takes: with DoRA the products alone, as their biases come after its vectors."""
    if experts.gate_bias is not None:
        gate = gate - experts.gate_bias
    if experts.up_bias is not None:
        up = up - experts.up_bias
    return gate, up


def project_low(x: Tensor, experts: PreparedExperts, spec: RethinkingSpec) -> Tensor:
    """A dropout(x) of every expert, [N, 2nr], for x [N, D]: what `expert_swiglu` calls ``low``."""
    with named_range("experts"):
        return F.linear(F.dropout(x, spec.dropout), experts.low_A)


def expert_round(
    inputs: RoundInputs,
    experts: PreparedExperts,
    routing: RoundRouting,
    down_router: Tensor | None,
    settings: RoundSettings,
) -> RoundOutput:
    """One round of experts up to the down projection; ``down_router`` [n, F] is there for mixed experts."""
    if down_router is not None:
        return _mixed_round(inputs, experts, routing, down_router, settings)
    if experts.down_scale is None:
        c, z = _swiglu(inputs, experts, routing, settings)
        return RoundOutput((c,), z, (), routing.routings)
    return _round_by_slots(inputs, experts, routing, settings)


def _round_by_slots(
    inputs: RoundInputs, experts: PreparedExperts, routing: RoundRouting, settings: RoundSettings
) -> RoundOutput:
    """Chosen experts with DoRA: each slot's c apart, for its expert has its own vector after the down projection."""
    assert experts.down_scale is not None
    parts, changes, z = [], [], None
    for slot in range(routing.expert_ids.shape[1]):
        own = slice(slot, slot + 1)
        alone = routing._replace(routing_weights=routing.routing_weights[:, own], expert_ids=routing.expert_ids[:, own])
        c, own_z = _swiglu(inputs, experts, alone, settings)
        parts.append(c)
        changes.append(F.embedding(alone.expert_ids[:, 0].long(), experts.down_scale - 1).to(c.dtype))  # [N, D]
        z = own_z if z is None else z + own_z
    assert z is not None
    return RoundOutput(tuple(parts), z, tuple(changes), routing.routings)


def _mixed_round(
    inputs: RoundInputs,
    experts: PreparedExperts,
    routing: RoundRouting,
    down_router: Tensor,
    settings: RoundSettings,
) -> RoundOutput:
    """Experts mixed inside each linear: to all tokens they are one update of rank 2nr, as a later round's is of G."""
    assert routing.mixing is not None
    low = inputs.low if inputs.low_update is None else inputs.low + inputs.low_update
    with named_range("experts"):
        low = weighted(low, routing.mixing.flatten(1))
        if experts.gate_scale is not None and experts.up_scale is not None:
            inputs = _mixed_dora(inputs, experts, routing.mixing, experts.gate_scale, experts.up_scale)
        update = (low, experts.gate_B, experts.up_B)
        if inputs.update is not None:  # [H | low], as the fold holds [M | B]: one product instead of two
            update = (torch.cat([inputs.update[0], low], dim=1), *inputs.update[1:])
    c = _shared_swiglu(inputs._replace(update=update), settings)
    with named_range("experts"):
        z = F.linear(F.dropout(c, settings.spec.dropout), experts.down_A)  # [N, n*r]
    with named_range("routing"):
        down = route_one(c, down_router, settings)
        mixing = mixing_weights(down)  # [N, n]
    changes: tuple[Tensor, ...] = ()
    if experts.down_scale is not None:
        changes = (mixed_change(mixing, experts.down_scale).to(c.dtype),)
    return RoundOutput((c,), weighted(z, mixing), changes, (*routing.routings, down))


def _shared_swiglu(inputs: RoundInputs, settings: RoundSettings) -> Tensor:
    """act(g) * u, [N, F], of what the tokens share."""
    update = None if inputs.update is None else LowRankUpdate(*inputs.update)
    with named_range("experts"):
        return swiglu(
            GateUp(inputs.gate, inputs.up), update, activation=settings.spec.activation, backend=settings.backend
        )


def _mixed_dora(
    inputs: RoundInputs, experts: PreparedExperts, mixing: Tensor, gate_scale: Tensor, up_scale: Tensor
) -> RoundInputs:
    """(1 + sum_i p_i (m'_i - 1)) times what W gives, plus the bias: the base pre-activations of mixed DoRA experts."""
    gate, up = inputs.gate, inputs.up
    if inputs.update is not None:
        state, fold_gate, fold_up = inputs.update
        gate, up = torch.addmm(gate, state, fold_gate.T), torch.addmm(up, state, fold_up.T)
    gate = scaled_by(gate, mixed_change(mixing[:, 0], gate_scale))
    up = scaled_by(up, mixed_change(mixing[:, 1], up_scale))
    if experts.gate_bias is not None:
        gate = gate + experts.gate_bias
    if experts.up_bias is not None:
        up = up + experts.up_bias
    return inputs._replace(gate=gate, up=up, update=None)


def _swiglu(
    inputs: RoundInputs, experts: PreparedExperts, routing: RoundRouting, settings: RoundSettings
) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r] of all the slots in ``routing``."""
    spec = settings.spec
    seed = draw_seed(spec, inputs.gate.device)
    scales = biases = None
    if experts.gate_scale is not None and experts.up_scale is not None:
        scales = GateUp(experts.gate_scale, experts.up_scale)
    if experts.gate_bias is not None and experts.up_bias is not None:
        biases = GateUp(experts.gate_bias, experts.up_bias)
    operands = ExpertOperands(
        GateUp(inputs.gate, inputs.up),
        inputs.low,
        GateUp(experts.gate_B, experts.up_B),
        experts.down_A,
        routing.routing_weights,
        routing.expert_ids,
        low_update=inputs.low_update,
        update=None if inputs.update is None else LowRankUpdate(*inputs.update),
        scales=scales,
        biases=biases,
        dropout=None if seed is None else Dropout(spec.dropout, seed),
        token_order=token_order(routing, inputs.gate, experts.down_A, settings.backend),
    )
    with named_range("experts"):
        return expert_swiglu(operands, scale=spec.scale, activation=spec.activation, backend=settings.backend)


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x weight^T, written to y: a fresh tensor that nothing else reads."""
    return y.addmm_(x.to(y.dtype), weight.to(y.dtype).T)


def output(
    base: BaseMLP, out: RoundOutput, experts: PreparedExperts, routing: RoundRouting, spec: RethinkingSpec
) -> Tensor:
    """y = W_D c + s B_D z + (sum_j w_j) b_D, [N, D]; with DoRA the sum over slots of each one's scaled W_D c."""
    if out.down_changes:
        return _output_by_slots(base, out, experts, routing, spec)
    with named_range("mlp"):
        y = base.project_out(out.c[0])
    with named_range("experts"):
        y = add_product(y, out.z, experts.down_B)
    mixed = mixed_weight(routing, spec, y.dtype)
    if mixed is not None and experts.down_bias is not None:
        # project_out added the bias once; unnormalised weights do not sum to one
        y = y + (mixed - 1) * experts.down_bias.to(y.dtype)
    return y


def _output_by_slots(
    base: BaseMLP, out: RoundOutput, experts: PreparedExperts, routing: RoundRouting, spec: RethinkingSpec
) -> Tensor:
    total, bias = None, experts.down_bias
    for c, change in zip(out.c, out.down_changes, strict=True):
        with named_range("mlp"):
            part = base.project_out(c)
        if bias is not None:
            part = part - bias.to(part.dtype)
        part = scaled_by(part, change)
        total = part if total is None else total + part
    assert total is not None
    with named_range("experts"):
        y = add_product(total, out.z, experts.down_B)
    if bias is None:
        return y
    mixed = mixed_weight(routing, spec, y.dtype)
    return y + (bias.to(y.dtype) if mixed is None else mixed * bias.to(y.dtype))


def collect(y: Tensor, rounds: list[tuple[Routing, ...]]) -> RethinkingOutput:
    """The output with the logits of the rounds' routers, by router."""
    return RethinkingOutput(y, tuple(tuple(r.logits for r in own) for own in zip(*rounds, strict=True)))
