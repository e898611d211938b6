"""The fused expert round, forward: P_1 is read once, c is written once, z is reduced over F in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton_reduce import comes_last, store_split, sum_splits, write_wide
from graphmoe_kernels.experts.triton_tile import (
    base_tile,
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


@triton.jit(do_not_specialize=["tokens", "threshold", "splits"])
def forward_kernel(
    gate, up, state, fold_gate, fold_up, low, low_update, gate_B, up_B, down_A, gate_scale, up_scale, gate_bias,
    up_bias, weights, experts, order, seed, c, z, partial, present, tickets, tokens, width, inner, num_experts,
    stride_gate, stride_up, stride_state, stride_low, stride_update, scale, threshold, kept, split_width, splits,
    SLOTS: tl.constexpr, SLOTS_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_STATE: tl.constexpr, HAS_UPDATE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (tile of tokens, split of F). Shapes as in `graphmoe_kernels.expert_swiglu`.

    partial [splits, tokens, COLUMNS] fp32: z of a split in compact form, slot j's r values at columns j * RANK_PADDED;
    present: scratch of SLOTS * (1 + n) int32 a program; tickets: zeros, one a tile, zeros again at the end.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    token, live = tile_rows(order, tile, tokens, HAS_ORDER, BLOCK_M)
    present += (split * tl.num_programs(0) + tile).to(tl.int64) * (SLOTS * (num_experts + 1))
    ids = row_experts(experts, token, live, num_experts, SLOTS, SLOTS_PADDED)
    list_present(ids, present, num_experts, SLOTS, BLOCK_M)

    dtype = gate.dtype.element_ty
    PART: tl.constexpr = BLOCK_F // PARTS
    z_rows = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    for f0 in range(split * split_width, min((split + 1) * split_width, width), BLOCK_F):
        g_parts, u_parts = base_tile(
            gate, up, state, fold_gate, fold_up, token, live, f0, width, inner, stride_gate, stride_up,
            stride_state, HAS_STATE, PARTS, BLOCK_F, BLOCK_K,
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
                    g_parts[part], u_parts[part], low, low_update, gate_B, up_B, listed, chosen, token, f, width,
                    num_experts, stride_low, stride_update, scale, HAS_UPDATE, RANK, RANK_PADDED,
                )
                g, u = scale_and_shift(
                    g, u, gate_scale, up_scale, gate_bias, up_bias, listed, chosen, f, width, HAS_SCALE, HAS_BIAS
                )
                w = expert_weights(weights, ids, chosen, token, live, num_experts, SLOTS, SLOTS_PADDED)
                hidden = activate(g, ACTIVATION) * u * w[:, None]
                mixed += hidden
                if DROPOUT:
                    keep = keep_mask(tl.load(seed), token, chosen, f1, threshold, PART)
                    hidden = tl.where(keep, hidden * kept, 0.0)
                hidden = hidden.to(dtype)
                for i in range(tl.load(listed) if RANK > 0 else 0):
                    e = tl.load(listed + 1 + i)
                    a = slot_rows(down_A, e, slot, f, width, RANK, RANK_PADDED, COLUMNS)
                    z_rows = tl.dot(tl.where((chosen == e)[:, None], hidden, 0.0), a, z_rows, input_precision="ieee")
            inside = live[:, None] & (f < width)[None, :]
            tl.store(c + token[:, None] * width + f[None, :], mixed.to(dtype), mask=inside)

    last = splits == 1
    if splits > 1:
        store_split(z_rows, partial, tile, split, tokens, COLUMNS, BLOCK_M)
        last = comes_last(tickets, tile, splits)
        if last:
            z_rows = sum_splits(partial, tile, splits, tokens, COLUMNS, BLOCK_M)
    if last:
        write_wide(
            z_rows, z, num_experts * RANK, ids, token, live, num_experts, SLOTS, RANK, RANK_PADDED, COLUMNS, BLOCK_M
        )
