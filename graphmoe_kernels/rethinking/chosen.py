"""Chosen experts (MixLoRA): an expert is a whole MLP, one router gives every token k of them, each slot has one.

A single expert without a router (LoRA) is a chosen one that all tokens have. DoRA multiplies what W and B give by a
vector of each expert: inside the operator for gate and up, and slot by slot after the down projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.dora import scaled_rows
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp
from graphmoe_kernels.mixing import side_by_side
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.call import Call, check_experts, check_routed
from graphmoe_kernels.rethinking.down import PlainDown, RoundOutput, ScaledDown
from graphmoe_kernels.rethinking.kinds import CastExperts, LaterRouter, RoundInputs
from graphmoe_kernels.rethinking.lora import cast, dora_scales, input_biases, join_low_A, router_product, without
from graphmoe_kernels.rethinking.weights import BaseMLP, ExpertWeights


class ChosenRouting(NamedTuple):
    """Which experts a round's tokens have.

    Attributes:
        routing_weights, expert_ids: [N, k].
        logits: [N, n] of the router; none of a single expert.
    """

    routing_weights: Tensor
    expert_ids: Tensor
    logits: tuple[Tensor, ...]

    def slot(self, index: int) -> ChosenRouting:
        """The routing of one slot alone."""
        own = slice(index, index + 1)
        return self._replace(routing_weights=self.routing_weights[:, own], expert_ids=self.expert_ids[:, own])

    def weight_sum(self, call: Call) -> Tensor | None:
        """sum_j w_j, [N, 1], or None where it is 1 by construction."""
        return None if call.router.normalize else self.routing_weights.sum(dim=-1, keepdim=True)


class ChosenExperts(NamedTuple):
    """n whole MLPs as experts, of which one router chooses k for every token.

    Attributes:
        lora: their weights.
        router: [n, D].
    """

    lora: ExpertWeights
    router: Tensor

    def routers(self) -> list[Tensor]:
        """The one."""
        return [self.router]

    def route(self, x: Tensor, call: Call) -> ChosenRouting:
        """See `ExpertKind`."""
        return _route(x, self.router, call)

    def check_kernels(self, top_k: int, width: int, activation: str) -> None:
        """See `ExpertKind`."""
        check_routed(self.lora.gate_A.shape[0])
        _check_kernels(self.lora, top_k, width, activation)

    def fold_router(self, output: Tensor, dtype: torch.dtype) -> LaterRouter:
        """See `ExpertKind`."""
        return ChosenRouter(router_product(self.router, output, dtype))

    def cast(self, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
        """See `ExpertKind`."""
        return _cast_chosen(self.lora, base, dtype, scale, copy)


class SingleExpert(NamedTuple):
    """One expert without a router, which all tokens have.

    Attributes:
        lora: its weights, n = 1.
    """

    lora: ExpertWeights

    def routers(self) -> list[Tensor]:
        """None."""
        return []

    def route(self, x: Tensor, call: Call) -> ChosenRouting:
        """See `ExpertKind`: weight 1 for expert 0."""
        tokens, dtype = x.shape[0], torch.promote_types(x.dtype, torch.float32)
        ids = torch.zeros(tokens, 1, dtype=torch.int64, device=x.device)
        return ChosenRouting(x.new_ones(tokens, 1, dtype=dtype), ids, ())

    def check_kernels(self, top_k: int, width: int, activation: str) -> None:
        """See `ExpertKind`."""
        _check_kernels(self.lora, 1, width, activation)

    def fold_router(self, output: Tensor, dtype: torch.dtype) -> LaterRouter:
        """See `ExpertKind`."""
        return NoRouter()

    def cast(self, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
        """See `ExpertKind`."""
        return _cast_chosen(self.lora, base, dtype, scale, copy)


class ChosenRouter(NamedTuple):
    """R W_g, [n, G'], in fp32 at least."""

    weight: Tensor

    def route(self, total: Tensor, first: ChosenRouting, call: Call) -> ChosenRouting:
        """See `LaterRouter`."""
        return _route(total, self.weight, call, first.logits[0])

    def tensors(self) -> list[Tensor]:
        """The one."""
        return [self.weight]


class NoRouter(NamedTuple):
    """Of a single expert: every round's routing is the first one's."""

    def route(self, total: Tensor, first: ChosenRouting, call: Call) -> ChosenRouting:
        """See `LaterRouter`."""
        return first

    def tensors(self) -> list[Tensor]:
        """None."""
        return []


class CastChosen(NamedTuple):
    """Chosen experts in the compute dtype.

    Attributes:
        low_A: [2nr, D], see `CastExperts`.
        B: [n, F, r] each.
        down_A: [n, r, F].
        down: see `PlainDown`.
    """

    low_A: Tensor
    B: GateUp
    down_A: Tensor
    down: PlainDown

    def read(self, pre_activations: GateUp) -> GateUp:
        """See `CastExperts`."""
        return pre_activations

    def round(self, inputs: RoundInputs, routing: ChosenRouting, call: Call) -> RoundOutput:
        """See `CastExperts`."""
        hidden, low_down = _run(self, inputs, routing, call)
        return RoundOutput((hidden,), low_down, (), routing.weight_sum(call), routing.logits)

    def fold_update(self, products: GateUp) -> GateUp:
        """See `CastExperts`."""
        return products

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.low_A, *self.B, self.down_A, *self.down.tensors()]


class CastChosenDora(NamedTuple):
    """Chosen experts with DoRA in the compute dtype.

    Attributes:
        low_A, B, down_A: as in `CastChosen`.
        down: see `ScaledDown`.
        scales: DoRA's m / ||W + s B A||, [n, F] each, in fp32 at least.
        biases: [F] each, of an MLP that has them: the vectors multiply the product alone.
    """

    low_A: Tensor
    B: GateUp
    down_A: Tensor
    down: ScaledDown
    scales: GateUp
    biases: GateUp | None

    def read(self, pre_activations: GateUp) -> GateUp:
        """See `CastExperts`."""
        return without(pre_activations, self.biases)

    def round(self, inputs: RoundInputs, routing: ChosenRouting, call: Call) -> RoundOutput:
        """See `CastExperts`: each slot apart, for its expert has its own vector after the down projection."""
        parts, changes, sums = [], [], []
        for slot in range(routing.expert_ids.shape[1]):
            alone = routing.slot(slot)
            hidden, low_down = _run(self, inputs, alone, call, self.scales, self.biases)
            parts.append(hidden)
            changes.append(F.embedding(alone.expert_ids[:, 0].long(), self.down.change).to(hidden.dtype))  # [N, D]
            sums.append(low_down)
        total = sums[0]
        for low_down in sums[1:]:
            total = total + low_down
        return RoundOutput(tuple(parts), total, tuple(changes), routing.weight_sum(call), routing.logits)

    def fold_update(self, products: GateUp) -> GateUp:
        """See `CastExperts`."""
        return products

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.low_A, *self.B, self.down_A, *self.down.tensors(), *self.scales, *(self.biases or ())]


def _cast_chosen(lora: ExpertWeights, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
    B = GateUp(lora.gate_B.to(dtype, copy=copy), lora.up_B.to(dtype, copy=copy))
    down_A, bias = lora.down_A.to(dtype, copy=copy), cast(base.biases()[2], dtype, copy)
    if lora.magnitudes is None:
        down_B = (scale * side_by_side(lora.down_B)).to(dtype)
        return CastChosen(join_low_A(lora, dtype), B, down_A, PlainDown(down_B, bias))
    gate, up, down = dora_scales(lora, lora.magnitudes, base, scale)
    down_B = (scale * side_by_side(scaled_rows(lora.down_B, down))).to(dtype)
    scaled = ScaledDown(down_B, bias, down - 1)
    return CastChosenDora(join_low_A(lora, dtype), B, down_A, scaled, GateUp(gate, up), input_biases(base, dtype, copy))


def _check_kernels(lora: ExpertWeights, top_k: int, width: int, activation: str) -> None:
    slots = top_k if lora.magnitudes is None else 1  # with DoRA the slots run one by one
    check_experts(lora.down_A.shape, slots, width, activation)


def _route(x: Tensor, router: Tensor, call: Call, offset: Tensor | None = None) -> ChosenRouting:
    with named_range("routing"):
        found = call.route(x, router, offset)
    return ChosenRouting(found.routing_weights, found.expert_ids, (found.logits,))


def _run(
    experts: CastChosen | CastChosenDora,
    inputs: RoundInputs,
    routing: ChosenRouting,
    call: Call,
    scales: GateUp | None = None,
    biases: GateUp | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r] of all the slots in ``routing``."""
    with named_range("experts"):
        return call.experts(
            ExpertOperands(
                inputs.pre_activations,
                inputs.low,
                experts.B,
                experts.down_A,
                routing.routing_weights,
                routing.expert_ids,
                inputs.low_update,
                inputs.update,
                scales,
                biases,
                call.draw_dropout(inputs.low.device),
                _token_order(routing, inputs.low, experts.down_A, call),
            )
        )


def _token_order(routing: ChosenRouting, low: Tensor, down_A: Tensor, call: Call) -> Tensor | None:
    """`Call.token_order`; None where all tokens have the same expert."""
    if call.backend != "triton" or not routing.logits:
        return None
    with named_range("routing"):
        return call.token_order(routing.expert_ids, down_A, low.dtype)
