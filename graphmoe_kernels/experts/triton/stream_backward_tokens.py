"""The backward of a streamed expert round to what belongs to tokens: P_t, the low-rank activations, routing weights."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.stream_tile import (
    add_written,
    expert_backward,
    expert_matrices,
    expert_vectors,
    first_column,
    gradient_rows,
    launched_tiles,
    load_base,
    placed_expert,
    placed_rows,
    placed_weights,
    scaled,
    stream_columns,
)
from graphmoe_kernels.experts.triton.tile import (
    columns_inside,
    compact_columns,
    padded_rank,
)


@triton.jit
def add_products(gate, up, d_g, d_u, matrices):
    """gate and up [BLOCK_M, padded rank] plus d_g and d_u [BLOCK_M, BLOCK_F] times an expert's B."""
    gate = tl.dot(d_g.to(matrices[0].dtype), tl.trans(matrices[0]), gate, input_precision="ieee")
    return gate, tl.dot(d_u.to(matrices[1].dtype), tl.trans(matrices[1]), up, input_precision="ieee")


@triton.jit
def store_rows(out, rows, tile, i, EXPERTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write the rows of a tile's i-th expert side by side to ``out`` [positions, EXPERTS, 3, padded rank]."""
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = out + (position * EXPERTS + i)[:, None] * (3 * padded_rank(RANK)) + tl.arange(0, padded_rank(RANK))[None, :]
    for part in tl.static_range(3):
        tl.store(at + part * padded_rank(RANK), rows[part])


@triton.jit
def store_sums(sums, at, i, gate, up, of_weight, EXPERTS: tl.constexpr, RANK: tl.constexpr):
    """Write what a split adds to the gradients of its i-th expert's rows; ``at`` [BLOCK_M] are their places."""
    columns = at[:, None] * compact_columns(EXPERTS, RANK) + i * padded_rank(RANK)
    columns += tl.arange(0, padded_rank(RANK))[None, :]
    tl.store(sums.gate + columns, gate)
    tl.store(sums.up + columns, up)
    tl.store(sums.routing_weights + at * EXPERTS + i, of_weight)


@triton.jit(do_not_specialize=["num_positions", "piece"])
def experts_stream_backward_tokens(
    operands, strides, placed, added, stride_added, piece, grads, gradients,
    stride_gradients, sums, num_positions, width, num_experts, scale,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    LAUNCHES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, WHOLE: tl.constexpr,
):
    """Program (placed tile of those of the launch, split of the piece's blocks), as `experts_stream`.

    grads: of hidden [N, F] and of low_down [N, n*r], contiguous. gradients: a `GateUp`, [rows or tokens, the piece's
    columns or more] each. sums: a `StreamSums`, what each split adds to the gradients of the low-rank activations and
    of the routing weights, and what the tiles read of both.
    """
    first, end_tile = launched_tiles(placed, piece.number, LAUNCHES)
    tile, split = first + tl.program_id(0), tl.program_id(1)
    if tile >= end_tile:
        return
    row, token, live = placed_rows(placed, tile, SLOTS, EXPERTS, LAUNCHES, BLOCK_M)
    e0 = tl.minimum(placed_expert(placed, tile, 0, EXPERTS), num_experts - 1)
    w0 = placed_weights(placed, tile, 0, EXPERTS, BLOCK_M)
    rows0 = gradient_rows(operands, strides, grads[1], token, live, e0, num_experts, RANK)
    e1, w1, rows1 = e0, w0, rows0
    if EXPERTS == 2:
        e1 = tl.minimum(placed_expert(placed, tile, 1, EXPERTS), num_experts - 1)
        w1 = placed_weights(placed, tile, 1, EXPERTS, BLOCK_M)
        rows1 = gradient_rows(operands, strides, grads[1], token, live, e1, num_experts, RANK)
    if piece.first_split + split == 0:  # for the kernel that sums over tokens
        store_rows(sums.rows, rows0, tile, 0, EXPERTS, RANK, BLOCK_M)
        if EXPERTS == 2:
            store_rows(sums.rows, rows1, tile, 1, EXPERTS, RANK, BLOCK_M)

    gate0 = tl.zeros([BLOCK_M, padded_rank(RANK)], tl.float32)
    up0, gate1, up1 = gate0, gate0, gate0
    of_weight0 = tl.zeros([BLOCK_M], tl.float32)
    of_weight1 = of_weight0
    begin, end = stream_columns(piece, split)
    for f0 in range(begin, min(end, width), BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        inside = live[:, None] & columns_inside(f, width, WHOLE)[None, :]
        g, u = load_base(operands, strides, added, stride_added, piece, token, live, f, width, WHOLE)
        d = tl.load(grads[0] + token[:, None] * width + f[None, :], mask=inside, other=0.0)
        matrices = expert_matrices(operands, e0, f, width, RANK, WHOLE)
        vectors = expert_vectors(operands.scales, e0, f, width, WHOLE)
        d_g, d_u, _, _, _, of_weight = expert_backward(
            g, u, d, rows0, w0, matrices, vectors, operands, e0, token, f0, width, scale, ACTIVATION, BLOCK_F,
            False, WHOLE,
        )
        d_g, d_u = scaled(d_g, d_u, vectors, operands.scales)
        gate0, up0 = add_products(gate0, up0, d_g, d_u, matrices)
        of_weight0 += tl.sum(of_weight, axis=1)
        if EXPERTS == 2:
            matrices = expert_matrices(operands, e1, f, width, RANK, WHOLE)
            vectors = expert_vectors(operands.scales, e1, f, width, WHOLE)
            other_g, other_u, _, _, _, of_weight = expert_backward(
                g, u, d, rows1, w1, matrices, vectors, operands, e1, token, f0, width, scale, ACTIVATION, BLOCK_F,
                False, WHOLE,
            )
            other_g, other_u = scaled(other_g, other_u, vectors, operands.scales)
            gate1, up1 = add_products(gate1, up1, other_g, other_u, matrices)
            of_weight1 += tl.sum(of_weight, axis=1)
            d_g += other_g
            d_u += other_u
        at = row[:, None] * stride_gradients + (f - first_column(piece))[None, :]
        d_g = add_written(d_g, gradients.gate, at, piece.number, inside, LAUNCHES)
        d_u = add_written(d_u, gradients.up, at, piece.number, inside, LAUNCHES)
        tl.store(gradients.gate + at, d_g.to(gradients.gate.dtype.element_ty), mask=inside)
        tl.store(gradients.up + at, d_u.to(gradients.up.dtype.element_ty), mask=inside)

    at = tl.cast(piece.first_split + split, tl.int64) * num_positions + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    store_sums(sums, at, 0, gate0, up0, of_weight0, EXPERTS, RANK)
    if EXPERTS == 2:
        store_sums(sums, at, 1, gate1, up1, of_weight1, EXPERTS, RANK)
