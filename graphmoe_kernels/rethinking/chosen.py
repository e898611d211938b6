"""Chosen experts (MixLoRA): an expert is a whole MLP, one router gives every token k of them, each slot has one.

A single expert without a router (LoRA) is a chosen one that all tokens have. DoRA multiplies what W and B give by a
vector of each expert: inside the operator for gate and up, and slot by slot after the down projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.experts.operands import ExpertOperands, ExpertsOutput, GateUp
from graphmoe_kernels.experts.triton.sizes import Sizes, check_sizes
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.call import Call
from graphmoe_kernels.rethinking.down import PlainDown, RoundOutput, ScaledDown
from graphmoe_kernels.rethinking.kinds import CastExperts, RoundInputs
from graphmoe_kernels.rethinking.lora import cast_down, dora_scales, input_biases, join_low_A, router_product, without
from graphmoe_kernels.rethinking.weights import BaseMLP, ExpertWeights
from graphmoe_kernels.routing.api import check_routed
from graphmoe_kernels.structures import cast


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
        return None if call.spec.normalize else self.routing_weights.sum(dim=-1, keepdim=True)


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
        return _route(x, self.router, call)

    def check_kernels(self, top_k: int, width: int, activation: str) -> None:
        check_routed(self.lora.gate_A.shape[0])
        _check_kernels(self.lora, top_k, width, activation)

    def fold_routers(self, output: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (router_product(self.router, output, dtype),)

    def route_later(
        self, products: tuple[Tensor, ...], total: Tensor, first: ChosenRouting, call: Call
    ) -> ChosenRouting:
        (product,), (logits,) = products, first.logits
        return _route(total, product, call, logits)

    def cast(self, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
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
        """Give weight 1 to expert 0."""
        tokens, dtype = x.shape[0], torch.promote_types(x.dtype, torch.float32)
        ids = torch.zeros(tokens, 1, dtype=torch.int64, device=x.device)
        return ChosenRouting(x.new_ones(tokens, 1, dtype=dtype), ids, ())

    def check_kernels(self, top_k: int, width: int, activation: str) -> None:
        _check_kernels(self.lora, 1, width, activation)

    def fold_routers(self, output: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return ()

    def route_later(
        self, products: tuple[Tensor, ...], total: Tensor, first: ChosenRouting, call: Call
    ) -> ChosenRouting:
        return first

    def cast(self, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
        return _cast_chosen(self.lora, base, dtype, scale, copy)


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
        return pre_activations

    def round(self, inputs: RoundInputs, routing: ChosenRouting, call: Call) -> RoundOutput:
        hidden, low_down, both = _run(self, inputs, routing, call)
        return RoundOutput((hidden,), low_down, (), routing.weight_sum(call), routing.logits, both)

    def fold_update(self, products: GateUp) -> GateUp:
        return products


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
        return without(pre_activations, self.biases)

    def round(self, inputs: RoundInputs, routing: ChosenRouting, call: Call) -> RoundOutput:
        """Run each slot apart, for its expert has its own vector after the down projection."""
        parts, changes, sums = [], [], []
        for slot in range(routing.expert_ids.shape[1]):
            alone = routing.slot(slot)
            hidden, low_down, _ = _run(self, inputs, alone, call, self.scales, self.biases)
            parts.append(hidden)
            changes.append(F.embedding(alone.expert_ids[:, 0].long(), self.down.change).to(hidden.dtype))  # [N, D]
            sums.append(low_down)
        total = sums[0]
        for low_down in sums[1:]:
            total = total + low_down
        return RoundOutput(tuple(parts), total, tuple(changes), routing.weight_sum(call), routing.logits)

    def fold_update(self, products: GateUp) -> GateUp:
        return products


def _cast_chosen(lora: ExpertWeights, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
    low_A, B = join_low_A(lora, dtype), cast(GateUp(lora.gate_B, lora.up_B), dtype, copy)
    down_A = cast(lora.down_A, dtype, copy)
    if lora.magnitudes is None:
        return CastChosen(low_A, B, down_A, PlainDown(*cast_down(lora, base, dtype, scale, copy)))
    gate, up, down = dora_scales(lora, lora.magnitudes, base, scale)
    scaled = ScaledDown(*cast_down(lora, base, dtype, scale, copy, down), down - 1)
    return CastChosenDora(low_A, B, down_A, scaled, GateUp(gate, up), input_biases(base, dtype, copy))


def _check_kernels(lora: ExpertWeights, top_k: int, width: int, activation: str) -> None:
    n, r, intermediate = lora.down_A.shape
    slots = top_k if lora.magnitudes is None else 1  # with DoRA the slots run one by one
    check_sizes(Sizes(0, intermediate, n, r, slots), width, activation)


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
) -> ExpertsOutput:
    """What the experts of all the slots in ``routing`` give."""
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
            )
        )
