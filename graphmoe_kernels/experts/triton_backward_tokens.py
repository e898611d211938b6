"""The fused expert round, backward to what belongs to tokens: P_1, the low-rank activations and the routing weights."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton_reduce import comes_last, store_split, sum_splits, write_wide
from graphmoe_kernels.experts.triton_slot_gradient import slot_gradient
from graphmoe_kernels.experts.triton_tile import (
    base_tile,
    list_present,
    next_expert,
    row_experts,
    scale_rows,
    slot_columns,
    tile_rows,
)


@triton.jit(do_not_specialize=["tokens", "threshold", "splits"])
def backward_tokens_kernel(
    gate, up, state, fold_gate, fold_up, low, low_update, gate_B, up_B, down_A, gate_scale, up_scale, gate_bias,
    up_bias, weights, experts, order, seed, d_c, d_z, d_gate, d_up, d_low, d_weights, partial_gate, partial_up,
    partial_weights, present, tickets, tokens, width, inner, num_experts, stride_gate, stride_up, stride_state,
    stride_low, stride_update, scale, threshold, kept, split_width, splits,
    SLOTS: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_STATE: tl.constexpr, HAS_UPDATE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (tile of tokens, split of F), as in the forward kernel.

    d_gate, d_up [N, F]: the slots' gradients summed; d_low [N, 2nr]; d_weights [N, k]. d_c [N, F] and d_z [N, n*r] are
    contiguous. The partial sums over splits are [splits, N, COLUMNS] twice and [splits, N, SLOTS_PADDED].
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    token, live = tile_rows(order, tile, tokens, HAS_ORDER, BLOCK_M)
    present += (split * tl.num_programs(0) + tile).to(tl.int64) * (SLOTS * (num_experts + 1))
    ids = row_experts(experts, token, live, num_experts, SLOTS, SLOTS_PADDED)
    list_present(ids, present, num_experts, SLOTS, BLOCK_M)

    dtype = gate.dtype.element_ty
    PART: tl.constexpr = BLOCK_F // PARTS
    slots = tl.arange(0, SLOTS_PADDED)
    low_gate = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    low_up = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    weight_rows = tl.zeros([BLOCK_M, SLOTS_PADDED], tl.float32)
    for f0 in range(split * split_width, min((split + 1) * split_width, width), BLOCK_F):
        g_parts, u_parts = base_tile(
            gate, up, state, fold_gate, fold_up, token, live, f0, width, inner, stride_gate, stride_up,
            stride_state, HAS_STATE, PARTS, BLOCK_F, BLOCK_K,
        )
        for part in tl.static_range(PARTS):
            f1 = f0 + part * PART
            f = f1 + tl.arange(0, PART)
            inside = live[:, None] & (f < width)[None, :]
            at = token[:, None] * width + f[None, :]
            d_gate_sum = tl.zeros([BLOCK_M, PART], tl.float32)
            d_up_sum = tl.zeros([BLOCK_M, PART], tl.float32)
            chosen = tl.full([BLOCK_M], -1, tl.int32)
            for slot in range(SLOTS):
                listed = present + slot * (num_experts + 1)
                chosen = next_expert(ids, chosen, num_experts)
                d_g, d_u, _, _, _, d_weight = slot_gradient(
                    g_parts[part], u_parts[part], tl.load(d_c + at, mask=inside, other=0.0).to(tl.float32), d_z,
                    low, low_update, gate_B, up_B, down_A, gate_scale, up_scale, gate_bias, up_bias, weights, listed,
                    ids, chosen, token, live, f, f1, width, num_experts, stride_low, stride_update, seed, scale,
                    threshold, kept, SLOTS, SLOTS_PADDED, RANK, RANK_PADDED, ACTIVATION, HAS_UPDATE, HAS_SCALE,
                    HAS_BIAS, DROPOUT, PART,
                )
                weight_rows += tl.where(ids == chosen[:, None], d_weight[:, None], 0.0)
                if HAS_SCALE:
                    d_g, d_u = scale_rows(d_g, d_u, gate_scale, up_scale, listed, chosen, f, width)
                d_gate_sum += d_g
                d_up_sum += d_u
                d_g = d_g.to(dtype)
                d_u = d_u.to(dtype)
                for i in range(tl.load(listed) if RANK > 0 else 0):
                    e = tl.load(listed + 1 + i)
                    hit = (chosen == e)[:, None]
                    B = slot_columns(gate_B, e, slot, f, width, RANK, RANK_PADDED, COLUMNS)
                    low_gate = tl.dot(tl.where(hit, d_g, 0.0), B, low_gate, input_precision="ieee")
                    B = slot_columns(up_B, e, slot, f, width, RANK, RANK_PADDED, COLUMNS)
                    low_up = tl.dot(tl.where(hit, d_u, 0.0), B, low_up, input_precision="ieee")
            tl.store(d_gate + at, d_gate_sum.to(dtype), mask=inside)
            tl.store(d_up + at, d_up_sum.to(dtype), mask=inside)

    last = splits == 1
    if splits > 1:
        store_split(low_gate, partial_gate, tile, split, tokens, COLUMNS, BLOCK_M)
        store_split(low_up, partial_up, tile, split, tokens, COLUMNS, BLOCK_M)
        store_split(weight_rows, partial_weights, tile, split, tokens, SLOTS_PADDED, BLOCK_M)
        last = comes_last(tickets, tile, splits)
        if last:
            low_gate = sum_splits(partial_gate, tile, splits, tokens, COLUMNS, BLOCK_M)
            low_up = sum_splits(partial_up, tile, splits, tokens, COLUMNS, BLOCK_M)
            weight_rows = sum_splits(partial_weights, tile, splits, tokens, SLOTS_PADDED, BLOCK_M)
    if last:
        whole = num_experts * RANK
        write_wide(
            low_gate * scale, d_low, 2 * whole, ids, token, live, num_experts, SLOTS, RANK, RANK_PADDED, COLUMNS,
            BLOCK_M,
        )
        write_wide(
            low_up * scale, d_low + whole, 2 * whole, ids, token, live, num_experts, SLOTS, RANK, RANK_PADDED,
            COLUMNS, BLOCK_M,
        )
        own = live[:, None] & (slots < SLOTS)[None, :]
        tl.store(d_weights + token[:, None] * SLOTS + slots[None, :], weight_rows, mask=own)
