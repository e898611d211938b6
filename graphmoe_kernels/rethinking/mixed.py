"""Mixed experts (LoRAMoE, MoLA): experts belong to a linear, whose own router weighs them for every token.

Two routers read x, one reads what the down projection reads. Once their low-rank activations are multiplied with the
routing weights, B is the same for all tokens: the experts are an update of the pre-activations, as a later round's is.
See `graphmoe_kernels.mixing`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.activations import check_triton_form
from graphmoe_kernels.dora import scaled_by, scaled_rows
from graphmoe_kernels.experts.operands import GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton.sizes import check_offsets
from graphmoe_kernels.mixing import mixed_change, mixing_weights, side_by_side, weighted
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.call import Call
from graphmoe_kernels.rethinking.down import PlainDown, RoundOutput, ScaledDown
from graphmoe_kernels.rethinking.kinds import CastExperts, RoundInputs
from graphmoe_kernels.rethinking.lora import cast_down, dora_scales, input_biases, join_low_A, router_product, without
from graphmoe_kernels.rethinking.weights import BaseMLP, ExpertWeights, LinearRouters
from graphmoe_kernels.routing.api import check_routed
from graphmoe_kernels.structures import cast


class MixedRouting(NamedTuple):
    """How much of every expert a round's tokens have in the gate and up projections.

    Attributes:
        mixing: [N, 2, n], gate's and up's.
        logits: [N, n] of either router.
        down_router: [n, F], which is asked once its input is there.
    """

    mixing: Tensor
    logits: tuple[Tensor, Tensor]
    down_router: Tensor


class MixedExperts(NamedTuple):
    """n experts of each linear, mixed by a router of the linear's own.

    Attributes:
        lora: their weights.
        linear_routers: the three.
    """

    lora: ExpertWeights
    linear_routers: LinearRouters

    def routers(self) -> list[Tensor]:
        """Of gate, up and down."""
        return list(self.linear_routers)

    def route(self, x: Tensor, call: Call) -> MixedRouting:
        """Ask the routers that read x; that of the down projection has its turn in `CastExperts.round`."""
        gate, up, down = self.linear_routers
        return _route(x, GateUp(gate, up), down, call)

    def check_kernels(self, top_k: int, width: int, activation: str) -> None:
        n, r, intermediate = self.lora.down_A.shape
        check_routed(n)
        check_triton_form(activation)
        check_offsets(intermediate, width + 2 * n * r)

    def fold_routers(self, output: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        gate, up, _ = self.linear_routers
        return router_product(gate, output, dtype), router_product(up, output, dtype)

    def route_later(self, products: tuple[Tensor, ...], total: Tensor, first: MixedRouting, call: Call) -> MixedRouting:
        return _route(total, GateUp(*products), self.linear_routers.down, call, first.logits)

    def cast(self, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
        return _cast_mixed(self.lora, base, dtype, scale, copy)


class CastMixed(NamedTuple):
    """Mixed experts in the compute dtype.

    Attributes:
        low_A: [2nr, D], see `CastExperts`.
        B: s B_G beside zeros and zeros beside s B_U, [F, 2nr]: both read the low-rank activations of gate and up.
        down_A: [n*r, F].
        down: see `PlainDown`.
    """

    low_A: Tensor
    B: GateUp
    down_A: Tensor
    down: PlainDown

    def read(self, pre_activations: GateUp) -> GateUp:
        return pre_activations

    def round(self, inputs: RoundInputs, routing: MixedRouting, call: Call) -> RoundOutput:
        """Run the experts as the one update of rank 2nr that they are to all tokens."""
        with named_range("experts"):
            low = _mixed_low(inputs, routing)
            update = LowRankUpdate(low, *self.B)
            if inputs.update is not None:  # [H | low] with [M | B] (`fold_update`): one product instead of two
                state, gate, up = inputs.update
                update = LowRankUpdate(torch.cat([state, low], dim=1), gate, up)
            hidden = call.swiglu(inputs.pre_activations, update)
        low_down, _, logits = _mix_down(hidden, self.down_A, routing, call)
        return RoundOutput((hidden,), low_down, (), None, (*routing.logits, logits))

    def fold_update(self, products: GateUp) -> GateUp:
        """Put them beside B, [F, G' + 2nr] each."""
        gate, up = (torch.cat([M, B], dim=1) for M, B in zip(products, self.B, strict=True))
        return GateUp(gate, up)


class CastMixedDora(NamedTuple):
    """Mixed experts with DoRA in the compute dtype.

    Attributes:
        low_A, B, down_A: as in `CastMixed`; the rows of B are scaled.
        down: see `ScaledDown`.
        changes: DoRA's m / ||W + s B A|| - 1, [n, F] each, in fp32 at least.
        biases: [F] each, of an MLP that has them: the vectors multiply the product alone.
    """

    low_A: Tensor
    B: GateUp
    down_A: Tensor
    down: ScaledDown
    changes: GateUp
    biases: GateUp | None

    def read(self, pre_activations: GateUp) -> GateUp:
        return without(pre_activations, self.biases)

    def round(self, inputs: RoundInputs, routing: MixedRouting, call: Call) -> RoundOutput:
        """Take (1 + sum_i p_i (m_i - 1)) times what W gives, plus bias and update."""
        with named_range("experts"):
            low = _mixed_low(inputs, routing)
            gate, up = inputs.pre_activations
            if inputs.update is not None:
                state, fold_gate, fold_up = inputs.update
                gate, up = torch.addmm(gate, state, fold_gate.T), torch.addmm(up, state, fold_up.T)
            gate = scaled_by(gate, mixed_change(routing.mixing[:, 0], self.changes.gate))
            up = scaled_by(up, mixed_change(routing.mixing[:, 1], self.changes.up))
            if self.biases is not None:
                gate, up = gate + self.biases.gate, up + self.biases.up
            hidden = call.swiglu(GateUp(gate, up), LowRankUpdate(low, *self.B))
        low_down, mixing, logits = _mix_down(hidden, self.down_A, routing, call)
        change = mixed_change(mixing, self.down.change).to(hidden.dtype)
        return RoundOutput((hidden,), low_down, (change,), None, (*routing.logits, logits))

    def fold_update(self, products: GateUp) -> GateUp:
        return products  # DoRA's vectors come between them and B


def _cast_mixed(lora: ExpertWeights, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
    low_A, down_A = join_low_A(lora, dtype), cast(lora.down_A.flatten(0, 1), dtype, copy)
    if lora.magnitudes is None:
        B = _apart(lora.gate_B, lora.up_B, dtype, scale)
        return CastMixed(low_A, B, down_A, PlainDown(*cast_down(lora, base, dtype, scale, copy)))
    gate, up, down = dora_scales(lora, lora.magnitudes, base, scale)
    B = _apart(scaled_rows(lora.gate_B, gate), scaled_rows(lora.up_B, up), dtype, scale)
    scaled = ScaledDown(*cast_down(lora, base, dtype, scale, copy, down), down - 1)
    return CastMixedDora(low_A, B, down_A, scaled, GateUp(gate - 1, up - 1), input_biases(base, dtype, copy))


def _apart(gate_B: Tensor, up_B: Tensor, dtype: torch.dtype, scale: float) -> GateUp:
    """s B_G beside zeros and zeros beside s B_U, [F, 2nr]."""
    gate, up = scale * side_by_side(gate_B), scale * side_by_side(up_B)
    width = gate.shape[1]
    return GateUp(F.pad(gate, (0, width)).to(dtype), F.pad(up, (width, 0)).to(dtype))


def _route(
    x: Tensor, routers: GateUp, down_router: Tensor, call: Call, before: tuple[Tensor, Tensor] | None = None
) -> MixedRouting:
    offsets = (None, None) if before is None else before
    with named_range("routing"):
        gate, up = (call.route(x, router, offset) for router, offset in zip(routers, offsets, strict=True))
        mixing = torch.stack([mixing_weights(gate), mixing_weights(up)], dim=1)
    return MixedRouting(mixing, (gate.logits, up.logits), down_router)


def _mixed_low(inputs: RoundInputs, routing: MixedRouting) -> Tensor:
    low = inputs.low if inputs.low_update is None else inputs.low + inputs.low_update
    return weighted(low, routing.mixing.flatten(1))


def _mix_down(hidden: Tensor, down_A: Tensor, routing: MixedRouting, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """low_down [N, n*r] mixed by the down projection's router, its mixing weights and logits [N, n]."""
    with named_range("experts"):
        low_down = F.linear(call.drop(hidden), down_A)
    with named_range("routing"):
        found = call.route(hidden, routing.down_router)
        mixing = mixing_weights(found)
    return weighted(low_down, mixing), mixing, found.logits
