"""The fused expert round, backward to what belongs to experts: their B, A_D and scale vectors, summed over tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton_slot_gradient import slot_gradient
from graphmoe_kernels.experts.triton_tile import (
    base_tile,
    expert_weights,
    low_rank_rows,
    next_expert,
    row_experts,
    scale_rows,
    tile_rows,
)


@triton.jit
def add_product(out, e, x, hit, rows, f, width, RANK: tl.constexpr, RANK_PADDED: tl.constexpr):
    """Add x^T rows to columns f of expert e in ``out`` [n, F, r] fp32; x [BLOCK_M, BLOCK_F], rows [BLOCK_M, r].

    Both are zero where a row did not choose e: another token's infinity must not meet a zero here.
    """
    x = tl.where(hit[:, None], x, 0.0)
    i = tl.arange(0, RANK_PADDED)
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
def add_slot(
    d_gate_B, d_up_B, d_down_A, d_g, d_u, read, low, low_update, d_z, listed, chosen, token, f, width, num_experts,
    stride_low, stride_update, HAS_UPDATE: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
):
    """Add one slot's products to its experts' sums: d_g and d_u times A x, and what A_D read times d_z."""
    whole = num_experts * RANK
    for i in range(tl.load(listed)):
        e = tl.load(listed + 1 + i)
        hit = chosen == e
        own = e * RANK
        a = low_rank_rows(low, low_update, token, hit, own, stride_low, stride_update, HAS_UPDATE, RANK, RANK_PADDED)
        add_product(d_gate_B, e, d_g, hit, a, f, width, RANK, RANK_PADDED)
        own += whole
        a = low_rank_rows(low, low_update, token, hit, own, stride_low, stride_update, HAS_UPDATE, RANK, RANK_PADDED)
        add_product(d_up_B, e, d_u, hit, a, f, width, RANK, RANK_PADDED)
        rows = low_rank_rows(d_z, d_z, token, hit, e * RANK, whole, 0, False, RANK, RANK_PADDED)
        add_product(d_down_A, e, read, hit, rows, f, width, RANK, RANK_PADDED)


@triton.jit(do_not_specialize=["tokens", "threshold", "split_tiles"])
def backward_weights_kernel(
    gate, up, state, fold_gate, fold_up, low, low_update, gate_B, up_B, down_A, gate_scale, up_scale, gate_bias,
    up_bias, weights, experts, order, seed, d_c, d_z, d_gate_B, d_up_B, d_down_A, d_gate_scale, d_up_scale, present,
    tokens, width, inner, num_experts, stride_gate, stride_up, stride_state, stride_low, stride_update, scale,
    threshold, kept, split_tiles,
    SLOTS: tl.constexpr, SLOTS_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_STATE: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (columns of F, split of the tokens' tiles).

    Each split adds up its own d_gate_B, d_up_B, d_down_A [n, F, r] and d_*_scale [n, F], fp32 and zero before: tile
    after tile, so that the order of the sum is fixed. ``present``: the lists of the tokens' kernel, same BLOCK_M.
    """
    split = tl.program_id(1)
    own = split.to(tl.int64) * num_experts * width
    d_gate_B += own * RANK
    d_up_B += own * RANK
    d_down_A += own * RANK
    dtype = gate.dtype.element_ty
    PART: tl.constexpr = BLOCK_F // PARTS
    tiles = tl.cdiv(tokens, BLOCK_M)
    for tile in range(split * split_tiles, min((split + 1) * split_tiles, tiles)):
        token, live = tile_rows(order, tile, tokens, HAS_ORDER, BLOCK_M)
        ids = row_experts(experts, token, live, num_experts, SLOTS, SLOTS_PADDED)
        g_parts, u_parts = base_tile(
            gate, up, state, fold_gate, fold_up, token, live, tl.program_id(0) * BLOCK_F, width, inner, stride_gate,
            stride_up, stride_state, HAS_STATE, PARTS, BLOCK_F, BLOCK_K,
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
                    tl.load(d_c + token[:, None] * width + f[None, :], mask=inside, other=0.0).to(tl.float32), d_z, low,
                    low_update, gate_B, up_B, down_A, gate_scale, up_scale, gate_bias, up_bias, weights, listed, ids,
                    chosen, token, live, f, f0, width, num_experts, stride_low, stride_update, seed, scale, threshold,
                    kept, SLOTS, SLOTS_PADDED, RANK, RANK_PADDED, ACTIVATION, HAS_UPDATE, HAS_SCALE, HAS_BIAS, DROPOUT,
                    PART,
                )
                if HAS_SCALE:
                    for i in range(tl.load(listed)):
                        e = tl.load(listed + 1 + i)
                        hit = (chosen == e)[:, None]
                        add_sum(d_gate_scale + own, e, tl.where(hit, d_g * g_pre, 0.0), f, width)
                        add_sum(d_up_scale + own, e, tl.where(hit, d_u * u_pre, 0.0), f, width)
                    d_g, d_u = scale_rows(d_g, d_u, gate_scale, up_scale, listed, chosen, f, width)
                w = expert_weights(weights, ids, chosen, token, live, num_experts, SLOTS, SLOTS_PADDED)
                add_slot(
                    d_gate_B, d_up_B, d_down_A, (d_g * scale).to(dtype), (d_u * scale).to(dtype),
                    (read * w[:, None]).to(dtype), low, low_update, d_z, listed, chosen, token, f, width, num_experts,
                    stride_low, stride_update, HAS_UPDATE, RANK, RANK_PADDED,
                )
                tl.debug_barrier()  # the next sums are read by other threads than wrote these
