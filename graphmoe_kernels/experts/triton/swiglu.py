"""act(g) * u without experts, forward and backward: pre-activations, and an update of low rank that is never stored."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.tile import base_tile, tile_rows
from graphmoe_kernels.triton_activations import activate, differentiate


@triton.jit(do_not_specialize=["num_tokens"])
def swiglu_forward(
    pre_activations, update, strides, hidden, num_tokens, width, inner,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """hidden [N, F]: program (tile of tokens, split of F). Shapes as in `graphmoe_kernels.swiglu`."""
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    token, live = tile_rows(tile, num_tokens, BLOCK_M)
    PART: tl.constexpr = BLOCK_F // PARTS
    split_width = tl.cdiv(tl.cdiv(width, BLOCK_F), splits) * BLOCK_F
    for f0 in range(split * split_width, min((split + 1) * split_width, width), BLOCK_F):
        g_parts, u_parts = base_tile(
            pre_activations, update, strides, token, live, f0, width, inner, PARTS, BLOCK_F, BLOCK_K
        )
        for part in tl.static_range(PARTS):
            f = f0 + part * PART + tl.arange(0, PART)
            own = activate(g_parts[part], ACTIVATION) * u_parts[part]
            inside = live[:, None] & (f < width)[None, :]
            tl.store(hidden + token[:, None] * width + f[None, :], own.to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def swiglu_backward(
    pre_activations, update, strides, d_hidden, gradients, num_tokens, width, inner,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """gradients: gate and up [N, F], of what the activation reads; d_hidden [N, F] is contiguous."""
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    token, live = tile_rows(tile, num_tokens, BLOCK_M)
    dtype = gradients.gate.dtype.element_ty
    PART: tl.constexpr = BLOCK_F // PARTS
    split_width = tl.cdiv(tl.cdiv(width, BLOCK_F), splits) * BLOCK_F
    for f0 in range(split * split_width, min((split + 1) * split_width, width), BLOCK_F):
        g_parts, u_parts = base_tile(
            pre_activations, update, strides, token, live, f0, width, inner, PARTS, BLOCK_F, BLOCK_K
        )
        for part in tl.static_range(PARTS):
            f = f0 + part * PART + tl.arange(0, PART)
            inside = live[:, None] & (f < width)[None, :]
            at = token[:, None] * width + f[None, :]
            g = g_parts[part]
            d = tl.load(d_hidden + at, mask=inside, other=0.0).to(tl.float32)
            d_gate = d * u_parts[part] * differentiate(g, ACTIVATION)
            tl.store(gradients.gate + at, d_gate.to(dtype), mask=inside)
            tl.store(gradients.up + at, (d * activate(g, ACTIVATION)).to(dtype), mask=inside)
