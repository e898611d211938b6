"""The fused expert round, backward to what belongs to tokens: P_1, the low-rank activations and the routing weights."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.reduce import comes_last, store_split, sum_splits, write_wide
from graphmoe_kernels.experts.triton.slot_gradient import slot_gradient
from graphmoe_kernels.experts.triton.tile import (
    base_tile,
    compact_columns,
    list_present,
    next_expert,
    padded_slots,
    row_experts,
    scale_rows,
    slot_columns,
    tile_rows,
)


@triton.jit(do_not_specialize=["num_tokens"])
def experts_backward_tokens(
    operands, strides, d_hidden, d_low_down, gradients, scratch, present, counters, num_tokens, width, inner,
    num_experts, scale,
    SLOTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (tile of tokens, split of F), as in the forward kernel.

    gradients: gate and up [N, F], the slots' summed; low [N, 2nr]; routing_weights [N, k]. d_hidden [N, F] and
    d_low_down [N, n*r] are contiguous. scratch, fp32: the sums of a split, [splits, N, columns] twice and
    [splits, N, padded slots] (none of one split). present: SLOTS * (1 + n) int32 per program.
    """
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    COLUMNS: tl.constexpr = compact_columns(SLOTS, RANK)
    token, live = tile_rows(operands.token_order, tile, num_tokens, BLOCK_M)
    present += (split * tl.num_programs(0) + tile).to(tl.int64) * (SLOTS * (num_experts + 1))
    ids = row_experts(operands.expert_ids, token, live, num_experts, SLOTS)
    list_present(ids, present, num_experts, SLOTS, BLOCK_M)

    dtype = gradients.gate.dtype.element_ty
    PART: tl.constexpr = BLOCK_F // PARTS
    split_width = tl.cdiv(tl.cdiv(width, BLOCK_F), splits) * BLOCK_F
    low_gate = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    low_up = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    weight_rows = tl.zeros([BLOCK_M, padded_slots(SLOTS)], tl.float32)
    for f0 in range(split * split_width, min((split + 1) * split_width, width), BLOCK_F):
        g_parts, u_parts = base_tile(
            operands.pre_activations, operands.update, strides, token, live, f0, width, inner, PARTS, BLOCK_F, BLOCK_K
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
                    g_parts[part], u_parts[part], tl.load(d_hidden + at, mask=inside, other=0.0).to(tl.float32),
                    d_low_down, operands, strides, listed, ids, chosen, token, live, f1, width, num_experts, scale,
                    SLOTS, RANK, ACTIVATION, PART,
                )
                weight_rows += tl.where(ids == chosen[:, None], d_weight[:, None], 0.0)
                if operands.scales is not None:
                    d_g, d_u = scale_rows(d_g, d_u, operands.scales, listed, chosen, f, width)
                d_gate_sum += d_g
                d_up_sum += d_u
                d_g = d_g.to(dtype)
                d_u = d_u.to(dtype)
                for i in range(tl.load(listed)):
                    e = tl.load(listed + 1 + i)
                    hit = (chosen == e)[:, None]
                    B = slot_columns(operands.B.gate, e, slot, f, width, SLOTS, RANK)
                    low_gate = tl.dot(tl.where(hit, d_g, 0.0), B, low_gate, input_precision="ieee")
                    B = slot_columns(operands.B.up, e, slot, f, width, SLOTS, RANK)
                    low_up = tl.dot(tl.where(hit, d_u, 0.0), B, low_up, input_precision="ieee")
            tl.store(gradients.gate + at, d_gate_sum.to(dtype), mask=inside)
            tl.store(gradients.up + at, d_up_sum.to(dtype), mask=inside)

    last = splits == 1
    if splits > 1:
        of_up = scratch + splits.to(tl.int64) * num_tokens * COLUMNS
        of_weights = of_up + splits.to(tl.int64) * num_tokens * COLUMNS
        store_split(low_gate, scratch, tile, split, num_tokens, COLUMNS, BLOCK_M)
        store_split(low_up, of_up, tile, split, num_tokens, COLUMNS, BLOCK_M)
        store_split(weight_rows, of_weights, tile, split, num_tokens, padded_slots(SLOTS), BLOCK_M)
        last = comes_last(counters, tile, splits)
        if last:
            low_gate = sum_splits(scratch, tile, splits, num_tokens, COLUMNS, BLOCK_M)
            low_up = sum_splits(of_up, tile, splits, num_tokens, COLUMNS, BLOCK_M)
            weight_rows = sum_splits(of_weights, tile, splits, num_tokens, padded_slots(SLOTS), BLOCK_M)
    if last:
        whole = num_experts * RANK
        d_low = gradients.low
        write_wide(low_gate * scale, d_low, 2 * whole, ids, token, live, num_experts, SLOTS, RANK, BLOCK_M)
        write_wide(low_up * scale, d_low + whole, 2 * whole, ids, token, live, num_experts, SLOTS, RANK, BLOCK_M)
        slots = tl.arange(0, padded_slots(SLOTS))
        own = live[:, None] & (slots < SLOTS)[None, :]
        tl.store(gradients.routing_weights + token[:, None] * SLOTS + slots[None, :], weight_rows, mask=own)
