"""The backward of a streamed expert round to what belongs to tokens: P_t, the low-rank activations, routing weights."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.reduce import sum_splits, write_wide
from graphmoe_kernels.experts.triton.stream_tile import (
    expert_matrices,
    expert_vectors,
    load_base,
    placed_expert,
    placed_rows,
    placed_weights,
    scaled,
    slot_backward,
    slot_rows,
    stream_columns,
)
from graphmoe_kernels.experts.triton.tile import (
    columns_inside,
    compact_columns,
    next_expert,
    padded_rank,
    padded_slots,
    row_experts,
)


@triton.jit
def add_products(gate, up, d_g, d_u, matrices):
    """gate and up [BLOCK_M, padded rank] plus d_g and d_u [BLOCK_M, BLOCK_F] times an expert's B."""
    gate = tl.dot(d_g.to(matrices[0].dtype), tl.trans(matrices[0]), gate, input_precision="ieee")
    return gate, tl.dot(d_u.to(matrices[1].dtype), tl.trans(matrices[1]), up, input_precision="ieee")


@triton.jit
def store_rows(out, rows, tile, slot, SLOTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write a slot's rows side by side to ``out`` [positions, SLOTS, 3, padded rank]."""
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = out + (position * SLOTS + slot)[:, None] * (3 * padded_rank(RANK)) + tl.arange(0, padded_rank(RANK))[None, :]
    for part in tl.static_range(3):
        tl.store(at + part * padded_rank(RANK), rows[part])


@triton.jit
def store_slot(sums, row, slot, gate, up, of_weight, SLOTS: tl.constexpr, RANK: tl.constexpr):
    """Write what a split adds to the gradients of one slot; ``row`` [BLOCK_M] are its rows in ``sums``."""
    at = row[:, None] * compact_columns(SLOTS, RANK) + slot * padded_rank(RANK)
    at += tl.arange(0, padded_rank(RANK))[None, :]
    tl.store(sums.gate + at, gate)
    tl.store(sums.up + at, up)
    tl.store(sums.routing_weights + row * padded_slots(SLOTS) + slot, of_weight)


@triton.jit(do_not_specialize=["num_positions", "piece"])
def experts_stream_backward_tokens(
    operands, strides, placed, added, stride_added, piece, d_hidden, d_low_down, gradients, sums, num_positions, width,
    num_experts, scale,
    SLOTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Program (placed tile, split of the piece's blocks of columns), as `experts_stream`.

    d_hidden [N, F] and d_low_down [N, n*r] are contiguous. gradients: a `TokenGradients`. sums: a `StreamSums`, what
    each split adds to the gradients of the low-rank activations and of the routing weights, and the tiles' rows.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(placed.used):
        return
    token, live = placed_rows(placed, tile, BLOCK_M)
    e0 = tl.minimum(placed_expert(placed, tile, 0, SLOTS), num_experts - 1)
    w0 = placed_weights(placed, tile, 0, SLOTS, BLOCK_M)
    rows0 = slot_rows(operands, strides, d_low_down, token, live, e0, num_experts, RANK)
    e1, w1, rows1 = e0, w0, rows0
    if SLOTS == 2:
        e1 = tl.minimum(placed_expert(placed, tile, 1, SLOTS), num_experts - 1)
        w1 = placed_weights(placed, tile, 1, SLOTS, BLOCK_M)
        rows1 = slot_rows(operands, strides, d_low_down, token, live, e1, num_experts, RANK)
    if piece.first_split + split == 0:  # for the kernel that sums over tokens
        store_rows(sums.rows, rows0, tile, 0, SLOTS, RANK, BLOCK_M)
        if SLOTS == 2:
            store_rows(sums.rows, rows1, tile, 1, SLOTS, RANK, BLOCK_M)

    gate0 = tl.zeros([BLOCK_M, padded_rank(RANK)], tl.float32)
    up0, gate1, up1 = gate0, gate0, gate0
    of_weight0 = tl.zeros([BLOCK_M], tl.float32)
    of_weight1 = of_weight0
    begin, end = stream_columns(piece, split)
    for f0 in range(begin, min(end, width), BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        inside = live[:, None] & columns_inside(f, width, WHOLE)[None, :]
        at = token[:, None] * width + f[None, :]
        g, u = load_base(operands, strides, added, stride_added, piece, token, live, f, width, WHOLE)
        d = tl.load(d_hidden + at, mask=inside, other=0.0)
        matrices = expert_matrices(operands, e0, f, width, RANK, WHOLE)
        vectors = expert_vectors(operands.scales, e0, f, width, WHOLE)
        d_g, d_u, _, _, _, of_weight = slot_backward(
            g, u, d, rows0, w0, matrices, vectors, operands, e0, token, f0, width, scale, ACTIVATION, BLOCK_F,
            False, WHOLE,
        )
        d_g, d_u = scaled(d_g, d_u, vectors, operands.scales)
        gate0, up0 = add_products(gate0, up0, d_g, d_u, matrices)
        of_weight0 += tl.sum(of_weight, axis=1)
        if SLOTS == 2:
            matrices = expert_matrices(operands, e1, f, width, RANK, WHOLE)
            vectors = expert_vectors(operands.scales, e1, f, width, WHOLE)
            other_g, other_u, _, _, _, of_weight = slot_backward(
                g, u, d, rows1, w1, matrices, vectors, operands, e1, token, f0, width, scale, ACTIVATION, BLOCK_F,
                False, WHOLE,
            )
            other_g, other_u = scaled(other_g, other_u, vectors, operands.scales)
            gate1, up1 = add_products(gate1, up1, other_g, other_u, matrices)
            of_weight1 += tl.sum(of_weight, axis=1)
            d_g += other_g
            d_u += other_u
        tl.store(gradients.gate + at, d_g.to(gradients.gate.dtype.element_ty), mask=inside)
        tl.store(gradients.up + at, d_u.to(gradients.up.dtype.element_ty), mask=inside)

    row = tl.cast(piece.first_split + split, tl.int64) * num_positions + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    store_slot(sums, row, 0, gate0, up0, of_weight0, SLOTS, RANK)
    if SLOTS == 2:
        store_slot(sums, row, 1, gate1, up1, of_weight1, SLOTS, RANK)


@triton.jit(do_not_specialize=["num_positions", "splits"])
def experts_stream_sum_tokens(
    sums, expert_ids, placed, gradients, num_positions, splits, num_experts, scale,
    SLOTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """The sums over the splits, first split first: gradients.low [N, 2nr] and gradients.routing_weights [N, k]."""
    tile = tl.program_id(0)
    token, live = placed_rows(placed, tile, BLOCK_M)
    ids = row_experts(expert_ids, token, live, num_experts, SLOTS)
    COLUMNS: tl.constexpr = compact_columns(SLOTS, RANK)
    whole = num_experts * RANK
    rows = sum_splits(sums.gate, tile, splits, num_positions, COLUMNS, BLOCK_M) * scale
    write_wide(rows, gradients.low, 2 * whole, ids, token, live, num_experts, SLOTS, RANK, BLOCK_M)
    rows = sum_splits(sums.up, tile, splits, num_positions, COLUMNS, BLOCK_M) * scale
    write_wide(rows, gradients.low + whole, 2 * whole, ids, token, live, num_experts, SLOTS, RANK, BLOCK_M)
    slot = tl.arange(0, padded_slots(SLOTS))[None, :]
    rows = sum_splits(sums.routing_weights, tile, splits, num_positions, padded_slots(SLOTS), BLOCK_M)
    of_smaller = tl.sum(tl.where(slot == 0, rows, 0.0), axis=1)[:, None]
    of_larger = tl.sum(tl.where(slot == 1, rows, 0.0), axis=1)[:, None]
    smaller = next_expert(ids, tl.full([BLOCK_M], -1, tl.int32), num_experts)[:, None]
    out = gradients.routing_weights + token[:, None] * SLOTS + slot
    tl.store(out, tl.where(ids == smaller, of_smaller, of_larger), mask=live[:, None] & (slot < SLOTS))
