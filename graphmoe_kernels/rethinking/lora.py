"""What experts of every kind need to get their weights into the form that the operators take."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.dora import dora_scale, scaled_rows
from graphmoe_kernels.exact_linear import exact_linear
from graphmoe_kernels.experts.operands import GateUp
from graphmoe_kernels.mixing import side_by_side
from graphmoe_kernels.rethinking.weights import BaseMLP, ExpertWeights, Magnitudes
from graphmoe_kernels.structures import cast


def join_low_A(lora: ExpertWeights, dtype: torch.dtype) -> Tensor:
    """Join A of gate and up of all experts, [2nr, D]: one product gives what `expert_swiglu` calls ``low``."""
    return torch.cat([lora.gate_A.flatten(0, 1), lora.up_A.flatten(0, 1)]).to(dtype)


def dora_scales(
    lora: ExpertWeights, magnitudes: Magnitudes, base: BaseMLP, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give DoRA's m / ||W + s B A|| in fp32 at least: of gate and up [n, F] and of down [n, D]."""
    dense = base.dense()
    return (
        dora_scale(magnitudes.gate, dense.gate, lora.gate_A, lora.gate_B, scale),
        dora_scale(magnitudes.up, dense.up, lora.up_A, lora.up_B, scale),
        dora_scale(magnitudes.down, dense.down, lora.down_A, lora.down_B, scale),
    )


def cast_down(
    lora: ExpertWeights, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool, vectors: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Give s B_D of all experts side by side, [D, n*r], its rows times DoRA's vectors, and the base's bias [D]."""
    down_B = scale * side_by_side(scaled_rows(lora.down_B, vectors))
    return down_B.to(dtype), cast(base.biases()[2], dtype, copy)


def input_biases(base: BaseMLP, dtype: torch.dtype, copy: bool) -> GateUp | None:
    """Give the biases of gate and up [F], both or none: zeros for one that is missing beside the other."""
    gate, up, _ = base.biases()
    if gate is None and up is None:
        return None
    gate, up = cast(gate, dtype, copy), cast(up, dtype, copy)
    if gate is None:
        gate = torch.zeros_like(up)  # type: ignore[arg-type]
    return GateUp(gate, torch.zeros_like(gate) if up is None else up)


def without(pre_activations: GateUp, biases: GateUp | None) -> GateUp:
    """Give pre-activations [N, F] without their biases, as those come after DoRA's vectors."""
    return pre_activations if biases is None else GateUp(*(x - b for x, b in zip(pre_activations, biases, strict=True)))


def router_product(router: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a router [n, D] with W_g [D, G'] in fp32 or, where ``dtype`` is fp64, in fp64."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return exact_linear(router.to(exact), output.to(exact).T)
