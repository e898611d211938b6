"""The expert round of many tokens: a stream over F in tiles of rows that share their experts.

Experts are scalars of a tile, so a step's loads depend on nothing that the step before computes, and the compiler has
them under way two steps ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.stream_tile import (
    add_written,
    expert_low_rows,
    expert_vectors,
    first_column,
    launched_tiles,
    load_base,
    placed_expert,
    placed_rows,
    placed_weights,
    scaled,
    stream_columns,
)
from graphmoe_kernels.experts.triton.tile import (
    compact_columns,
    expert_columns,
    expert_rows,
    keep_mask,
    padded_rank,
    shift,
)
from graphmoe_kernels.triton_activations import activate


@triton.jit
def expert_hidden(
    g, u, low, operands, e, f, width, scale,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
):
    """act(m (g + s B a) + b) * (m (u + s B a) + b) of expert e, [BLOCK_M, BLOCK_F] fp32."""
    g += scale * tl.dot(low[0], expert_columns(operands.B.gate, e, f, width, RANK), input_precision="ieee")
    u += scale * tl.dot(low[1], expert_columns(operands.B.up, e, f, width, RANK), input_precision="ieee")
    g, u = scaled(g, u, expert_vectors(operands.scales, e, f, width), operands.scales)
    g, u = shift(g, u, operands.biases, f, width)
    return activate(g, ACTIVATION, APPROXIMATE) * u


@triton.jit
def add_low_rank(z, own, operands, token, e, f0, width, RANK: tl.constexpr, BLOCK_F: tl.constexpr):
    """z [BLOCK_M, padded rank] plus A_e dropout(own) for the columns from f0 on."""
    if operands.dropout is not None:
        keep = keep_mask(operands.dropout, token, tl.zeros_like(token).to(tl.int32) + e, f0, BLOCK_F)
        own = tl.where(keep, own * operands.dropout.kept, 0.0)
    a = expert_rows(operands.down_A, e, f0 + tl.arange(0, BLOCK_F), width, RANK)
    return tl.dot(own.to(operands.down_A.dtype.element_ty), tl.trans(a), z, input_precision="ieee")


@triton.jit(do_not_specialize=["num_positions", "piece"])
def experts_stream(
    operands, strides, placed, added, stride_added, piece, hidden, stride_hidden, partial, num_positions, width,
    num_experts, scale,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    APPROXIMATE: tl.constexpr, LAUNCHES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Program (placed tile of those of the launch, split of the piece's blocks). Shapes as in `expert_swiglu`.

    hidden [rows or tokens, the piece's columns or more]: see `placed_rows`. partial [splits, positions, columns] fp32:
    what a split adds to low_down, the i-th expert's from column i * padded rank on.
    """
    first, end_tile = launched_tiles(placed, piece.number, LAUNCHES)
    tile, split = first + tl.program_id(0), tl.program_id(1)
    if tile >= end_tile:
        return
    row, token, live = placed_rows(placed, tile, SLOTS, EXPERTS, LAUNCHES, BLOCK_M)
    e0 = tl.minimum(placed_expert(placed, tile, 0, EXPERTS), num_experts - 1)
    w0 = placed_weights(placed, tile, 0, EXPERTS, BLOCK_M)
    low0 = expert_low_rows(operands, strides, token, live, e0, num_experts, RANK)
    e1, w1, low1 = e0, w0, low0
    if EXPERTS == 2:
        e1 = tl.minimum(placed_expert(placed, tile, 1, EXPERTS), num_experts - 1)
        w1 = placed_weights(placed, tile, 1, EXPERTS, BLOCK_M)
        low1 = expert_low_rows(operands, strides, token, live, e1, num_experts, RANK)

    z0 = tl.zeros([BLOCK_M, padded_rank(RANK)], tl.float32)
    z1 = tl.zeros([BLOCK_M, padded_rank(RANK)], tl.float32)
    begin, end = stream_columns(piece, split)
    PART: tl.constexpr = BLOCK_F // PARTS
    for block in range(begin, end, BLOCK_F):
        for part in tl.static_range(PARTS):
            f0 = block + part * PART
            f = f0 + tl.arange(0, PART)
            g, u = load_base(operands, strides, added, stride_added, piece, token, live, f, width)
            own = expert_hidden(g, u, low0, operands, e0, f, width, scale, RANK, ACTIVATION, APPROXIMATE)
            mixed = own * w0[:, None]
            z0 = add_low_rank(z0, own, operands, token, e0, f0, width, RANK, PART)
            if EXPERTS == 2:
                own = expert_hidden(g, u, low1, operands, e1, f, width, scale, RANK, ACTIVATION, APPROXIMATE)
                mixed += own * w1[:, None]
                z1 = add_low_rank(z1, own, operands, token, e1, f0, width, RANK, PART)
            at = row[:, None] * stride_hidden + (f - first_column(piece))[None, :]
            inside = live[:, None] & (f < width)[None, :]
            mixed = add_written(mixed, hidden, at, piece.number, inside, LAUNCHES)
            tl.store(hidden + at, mixed.to(hidden.dtype.element_ty), mask=inside)

    COLUMNS: tl.constexpr = compact_columns(EXPERTS, RANK)
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = (tl.cast(piece.first_split + split, tl.int64) * num_positions + position)[:, None] * COLUMNS
    i = tl.arange(0, padded_rank(RANK))[None, :]
    tl.store(partial + at + i, z0 * w0[:, None])
    if EXPERTS == 2:
        tl.store(partial + at + padded_rank(RANK) + i, z1 * w1[:, None])
