"""A layer's experts as the operators take them: joined, cast to the compute dtype, DoRA's vectors worked out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.dora import dora_scale, scaled_rows
from graphmoe_kernels.mixing import side_by_side
from graphmoe_kernels.rethinking.weights import LayerWeights, LinearRouters


class PreparedExperts(NamedTuple):
    """The experts in the compute dtype.

    Attributes:
        low_A: A of gate and up, all experts, [2nr, D]: one product gives what `expert_swiglu` calls ``low``.
        gate_B, up_B: [n, F, r]; down_A: [n, r, F]. Of mixed experts, side by side: s B_G beside zeros and zeros beside
            s B_U, [F, 2nr], which both read the low-rank activations of gate and up; and [n*r, F].
        down_B: s B_D of all experts side by side, [D, n*r]: what an [N, n*r] activation is multiplied with.
        gate_scale, up_scale, down_scale: DoRA's m / ||W + s B A||, [n, F], [n, F] and [n, D] in fp32 at least, or None.
            They multiply what W gives, and of chosen experts what gate_B and up_B give; the other B contain them.
        gate_bias, up_bias: [F], the base projections' biases where DoRA has to tell them from the product, or None.
        down_bias: [D] or None, the base down projection's.
    """

    low_A: Tensor
    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor
    down_B: Tensor
    gate_scale: Tensor | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def prepare_experts(weights: LayerWeights, dtype: torch.dtype, scale: float, copy: bool = False) -> PreparedExperts:
    """Casts and joins the experts' weights, differentiably; with ``copy`` nothing is shared with them."""
    experts, mixed = weights.experts, isinstance(weights.router, LinearRouters)
    gate_scale, up_scale, down_scale = _scales(weights, scale)
    gate_B, up_B, down_A, down_B = experts.gate_B, experts.up_B, experts.down_A, experts.down_B
    if mixed:
        joined_gate, joined_up = (
            scale * side_by_side(scaled_rows(*pair)) for pair in ((gate_B, gate_scale), (up_B, up_scale))
        )
        width = joined_gate.shape[1]
        gate_B, up_B = F.pad(joined_gate, (0, width)), F.pad(joined_up, (width, 0))
        down_A = down_A.flatten(0, 1)
    low_A = torch.cat([experts.gate_A.flatten(0, 1), experts.up_A.flatten(0, 1)])
    gate_bias, up_bias, down_bias = weights.base.biases()
    if gate_scale is None or (gate_bias is None and up_bias is None):
        gate_bias = up_bias = None
    else:  # both or none, as the operator takes them
        width = experts.gate_B.shape[1]
        gate_bias, up_bias = (low_A.new_zeros(width) if b is None else b for b in (gate_bias, up_bias))

    def cast(x: Tensor | None) -> Any:
        return None if x is None else x.to(dtype, copy=copy)

    return PreparedExperts(
        low_A=low_A.to(dtype),
        gate_B=cast(gate_B),
        up_B=cast(up_B),
        down_A=cast(down_A),
        down_B=(scale * side_by_side(scaled_rows(down_B, down_scale))).to(dtype),
        gate_scale=gate_scale,
        up_scale=up_scale,
        down_scale=down_scale,
        gate_bias=cast(gate_bias),
        up_bias=cast(up_bias),
        down_bias=cast(down_bias),
    )


def _scales(weights: LayerWeights, scale: float) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """DoRA's vectors of gate, up and down."""
    experts = weights.experts
    if experts.magnitudes is None:
        return None, None, None
    base = weights.base.dense()
    gate, up, down = experts.magnitudes
    return (
        dora_scale(gate, base.gate, experts.gate_A, experts.gate_B, scale),
        dora_scale(up, base.up, experts.up_A, experts.up_B, scale),
        dora_scale(down, base.down, experts.down_A, experts.down_B, scale),
    )
