"""The fused expert round, backward to what belongs to experts: their B, A_D and scale vectors, summed over tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.slot_gradient import slot_gradient
from graphmoe_kernels.experts.triton.tile import (
    base_tile,
    expert_weights,
    low_rank_rows,
    low_rows,
    next_expert,
    padded_rank,
    row_experts,
    scale_rows,
    tile_rows,
)


@triton.jit
def add_product(out, e, x, hit, rows, f, width, RANK: tl.constexpr):
    """Add x^T rows to columns f of expert e in ``out`` [n, F, r] fp32; x [BLOCK_M, BLOCK_F], rows [BLOCK_M, r].

    Both are zero where a row did not choose e: another token's infinity must not meet a zero here.
    """
    x = tl.where(hit[:, None], x, 0.0)
    i = tl.arange(0, padded_rank(RANK))
    inside = (f < width)[:, None] & (i < RANK)[None, :]
    at = out + e.to(tl.int64) * width * RANK + f[:, None] * RANK + i[None, :]
    sums = tl.load(at, mask=inside, other=0.0)
    tl.store(at, tl.dot(tl.trans(x), rows, sums, input_precision="ieee"), mask=inside)


@triton.jit
def add_sum(out, e, x, f, width):
    """Add the column sums of x [BLOCK_M, BLOCK_F] to columns f of expert e in ``out`` [n, F] fp32."""
    at = out + e.to(tl.int64) * width + f
    tl.store(at, tl.load(at, mask=f < width, other=0.0) + tl.sum(x, axis=0), mask=f < width)


@triton.jit
def add_scales(sums, own, d_g, d_u, g_pre, u_pre, listed, chosen, f, width):
    """Add one slot's products to the sums of its experts' scale vectors, gate's and up's [n, F] from ``own`` on."""
    for i in range(tl.load(listed)):
        e = tl.load(listed + 1 + i)
        hit = (chosen == e)[:, None]
        add_sum(sums.gate + own, e, tl.where(hit, d_g * g_pre, 0.0), f, width)
        add_sum(sums.up + own, e, tl.where(hit, d_u * u_pre, 0.0), f, width)


@triton.jit
def add_slot(
    sums, d_g, d_u, read, operands, strides, d_low_down, listed, chosen, token, f, width, num_experts,
    RANK: tl.constexpr,
):
    """Add one slot's products to its experts' sums: d_g and d_u times A x, and what A_D read times d_low_down."""
    sum_gate_B, sum_up_B, sum_down_A = sums
    for i in range(tl.load(listed)):
        e = tl.load(listed + 1 + i)
        hit = chosen == e
        rows = low_rows(operands, strides, token, hit, e * RANK, RANK)
        add_product(sum_gate_B, e, d_g, hit, rows, f, width, RANK)
        rows = low_rows(operands, strides, token, hit, (num_experts + e) * RANK, RANK)
        add_product(sum_up_B, e, d_u, hit, rows, f, width, RANK)
        rows = low_rank_rows(d_low_down, None, token, hit, e * RANK, num_experts * RANK, 0, RANK)
        add_product(sum_down_A, e, read, hit, rows, f, width, RANK)


@triton.jit(do_not_specialize=["num_tokens"])
def experts_backward_weights(
    operands, strides, d_hidden, d_low_down, sums, present, num_tokens, width, inner, num_experts, scale,
    SLOTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (columns of F, split of the tokens' tiles).

    Each split adds up its own ``sums``: gate_B, up_B and down_A [splits, n, F, r], scales.gate and scales.up
    [splits, n, F], fp32 and zero before: tile after tile, so that the order of the sum is fixed. ``present``: the lists
    of the tokens' kernel, same BLOCK_M.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    own = split.to(tl.int64) * num_experts * width
    products = (sums.gate_B + own * RANK, sums.up_B + own * RANK, sums.down_A + own * RANK)
    dtype = operands.down_A.dtype.element_ty
    PART: tl.constexpr = BLOCK_F // PARTS
    tiles = tl.cdiv(num_tokens, BLOCK_M)
    split_tiles = tl.cdiv(tiles, splits)
    for tile in range(split * split_tiles, min((split + 1) * split_tiles, tiles)):
        token, live = tile_rows(operands.token_order, tile, num_tokens, BLOCK_M)
        ids = row_experts(operands.expert_ids, token, live, num_experts, SLOTS)
        g_parts, u_parts = base_tile(
            operands.pre_activations, operands.update, strides, token, live, tl.program_id(0) * BLOCK_F, width, inner,
            PARTS, BLOCK_F, BLOCK_K,
        )
        for part in tl.static_range(PARTS):
            f0 = tl.program_id(0) * BLOCK_F + part * PART
            f = f0 + tl.arange(0, PART)
            inside = live[:, None] & (f < width)[None, :]
            chosen = tl.full([BLOCK_M], -1, tl.int32)
            for slot in range(SLOTS):
                listed = present + tl.cast(tile * SLOTS + slot, tl.int64) * (num_experts + 1)
                chosen = next_expert(ids, chosen, num_experts)
                d_g, d_u, g_pre, u_pre, read, _ = slot_gradient(
                    g_parts[part], u_parts[part],
                    tl.load(d_hidden + token[:, None] * width + f[None, :], mask=inside, other=0.0).to(tl.float32),
                    d_low_down, operands, strides, listed, ids, chosen, token, live, f0, width, num_experts, scale,
                    SLOTS, RANK, ACTIVATION, PART,
                )
                if operands.scales is not None:
                    add_scales(sums.scales, own, d_g, d_u, g_pre, u_pre, listed, chosen, f, width)
                    d_g, d_u = scale_rows(d_g, d_u, operands.scales, listed, chosen, f, width)
                w = expert_weights(operands.routing_weights, ids, chosen, token, live, num_experts, SLOTS)
                add_slot(
                    products, (d_g * scale).to(dtype), (d_u * scale).to(dtype), (read * w[:, None]).to(dtype), operands,
                    strides, d_low_down, listed, chosen, token, f, width, num_experts, RANK,
                )
                tl.debug_barrier()  # the next sums are read by other threads than wrote these
