"""The fused expert round, forward: P_1 is read once, hidden is written once, low_down is summed in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.reduce import comes_last, store_split, sum_splits, write_wide
from graphmoe_kernels.experts.triton.tile import (
    base_tile,
    compact_columns,
    expert_weights,
    keep_mask,
    list_present,
    next_expert,
    row_experts,
    scale_and_shift,
    slot_pre_activation,
    slot_rows,
    tile_rows,
)
from graphmoe_kernels.triton_activations import activate


@triton.jit(do_not_specialize=["num_tokens"])
def experts_forward(
    operands, strides, hidden, low_down, scratch, counters, num_tokens, width, inner, num_experts, scale,
    SLOTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (tile of tokens, split of F). Shapes as in `graphmoe_kernels.expert_swiglu`.

    scratch, fp32: [splits, N, columns], z of a split in compact form, slot j's r values from column j * padded rank on
    (none of one split); then SLOTS * (1 + n) int32 per program. counters: zeros, one per tile, zeros again at the end.
    """
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    COLUMNS: tl.constexpr = compact_columns(SLOTS, RANK)
    token, live = tile_rows(tile, num_tokens, BLOCK_M)
    ids = row_experts(operands.expert_ids, token, live, num_experts, SLOTS)
    summed = tl.where(splits > 1, splits, 0).to(tl.int64) * num_tokens * COLUMNS
    present = (scratch + summed).to(tl.pointer_type(tl.int32), bitcast=True)
    present += (split * tl.num_programs(0) + tile).to(tl.int64) * (SLOTS * (num_experts + 1))
    list_present(ids, present, num_experts, SLOTS, BLOCK_M)

    dtype = hidden.dtype.element_ty
    PART: tl.constexpr = BLOCK_F // PARTS
    split_width = tl.cdiv(tl.cdiv(width, BLOCK_F), splits) * BLOCK_F
    z_rows = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for f0 in range(split * split_width, min((split + 1) * split_width, width), BLOCK_F):
        g_parts, u_parts = base_tile(
            operands.pre_activations, operands.update, strides, token, live, f0, width, inner, PARTS, BLOCK_F, BLOCK_K
        )
        for part in tl.static_range(PARTS):
            f1 = f0 + part * PART
            f = f1 + tl.arange(0, PART)
            mixed = tl.zeros([BLOCK_M, PART], tl.float32)
            chosen = tl.full([BLOCK_M], -1, tl.int32)
            for slot in range(SLOTS):
                listed = present + slot * (num_experts + 1)
                chosen = next_expert(ids, chosen, num_experts)
                g, u = slot_pre_activation(
                    g_parts[part], u_parts[part], operands, strides, listed, chosen, token, f, width, num_experts,
                    scale, RANK,
                )
                g, u = scale_and_shift(g, u, operands, listed, chosen, f, width)
                w = expert_weights(operands.routing_weights, ids, chosen, token, live, num_experts, SLOTS)
                own = activate(g, ACTIVATION) * u * w[:, None]
                mixed += own
                if operands.dropout is not None:
                    keep = keep_mask(operands.dropout, token, chosen, f1, PART)
                    own = tl.where(keep, own * operands.dropout.kept, 0.0)
                own = own.to(dtype)
                for i in range(tl.load(listed)):
                    e = tl.load(listed + 1 + i)
                    a = slot_rows(operands.down_A, e, slot, f, width, SLOTS, RANK)
                    z_rows = tl.dot(tl.where((chosen == e)[:, None], own, 0.0), a, z_rows, input_precision="ieee")
            inside = live[:, None] & (f < width)[None, :]
            tl.store(hidden + token[:, None] * width + f[None, :], mixed.to(dtype), mask=inside)

    last = splits == 1
    if splits > 1:
        store_split(z_rows, scratch, tile, split, num_tokens, COLUMNS, BLOCK_M)
        last = comes_last(counters, tile, splits)
        if last:
            z_rows = sum_splits(scratch, tile, splits, num_tokens, COLUMNS, BLOCK_M)
    if last:
        write_wide(z_rows, low_down, num_experts * RANK, ids, token, live, num_experts, SLOTS, RANK, BLOCK_M)
