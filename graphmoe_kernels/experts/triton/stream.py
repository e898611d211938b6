"""The expert round of many tokens: a stream over F in tiles of tokens that share all their experts.

Experts are scalars of a tile, so a step's loads depend on nothing that the step before computes, and the compiler has
them under way two steps ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.reduce import sum_splits, write_wide
from graphmoe_kernels.experts.triton.tile import (
    compact_columns,
    expert_columns,
    expert_rows,
    expert_weights,
    keep_mask,
    load_pair,
    low_rows,
    next_expert,
    padded_rank,
    row_experts,
    shift,
    tile_rows,
)
from graphmoe_kernels.triton_activations import activate


@triton.jit
def expert_hidden(
    g, u, low_g, low_u, operands, e, f, width, scale,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
):
    """act(m (g + s B a) + b) * (m (u + s B a) + b) of expert e, [BLOCK_M, BLOCK_F] fp32."""
    g += scale * tl.dot(low_g, expert_columns(operands.B.gate, e, f, width, RANK), input_precision="ieee")
    u += scale * tl.dot(low_u, expert_columns(operands.B.up, e, f, width, RANK), input_precision="ieee")
    if operands.scales is not None:
        at = e.to(tl.int64) * width + f
        g *= tl.load(operands.scales.gate + at, mask=f < width, other=0.0).to(tl.float32)[None, :]
        u *= tl.load(operands.scales.up + at, mask=f < width, other=0.0).to(tl.float32)[None, :]
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
    operands, strides, added, stride_added, piece, hidden, partial, num_positions, width, num_experts, scale,
    SLOTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (tile of ``token_order``, split of the piece's blocks of columns). Shapes as in `expert_swiglu`.

    added: a pair [N, the piece's columns], H M^T, or None. piece: a `Piece`. partial [splits, positions, columns] fp32:
    z of a split, slot j's from column j * padded rank on.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    order = operands.token_order
    if tl.load(order + tile * BLOCK_M) < 0:
        return  # a tile's first row is a token's, unless there are fewer tiles than programs
    token, live = tile_rows(order, tile, num_positions, BLOCK_M)
    ids = row_experts(operands.expert_ids, token, live, num_experts, SLOTS)
    smaller = next_expert(ids, tl.full([BLOCK_M], -1, tl.int32), num_experts)
    larger = smaller if SLOTS == 1 else next_expert(ids, smaller, num_experts)
    broken = live & (larger == num_experts)  # an id that is none, or one that stands twice: NaN, so that it shows
    w0 = expert_weights(operands.routing_weights, ids, smaller, token, live, num_experts, SLOTS)
    w1 = expert_weights(operands.routing_weights, ids, larger, token, live, num_experts, SLOTS)
    w0 = tl.where(broken, float("nan"), w0)
    e0, e1 = tl.minimum(tl.min(smaller), num_experts - 1), tl.minimum(tl.min(larger), num_experts - 1)
    low_g0 = low_rows(operands, strides, token, live, e0 * RANK, RANK)
    low_u0 = low_rows(operands, strides, token, live, (num_experts + e0) * RANK, RANK)
    low_g1, low_u1 = low_g0, low_u0
    if SLOTS == 2:
        low_g1 = low_rows(operands, strides, token, live, e1 * RANK, RANK)
        low_u1 = low_rows(operands, strides, token, live, (num_experts + e1) * RANK, RANK)

    z0 = tl.zeros([BLOCK_M, padded_rank(RANK)], tl.float32)
    z1 = tl.zeros([BLOCK_M, padded_rank(RANK)], tl.float32)
    begin = piece.first_block + split * piece.split_blocks
    PART: tl.constexpr = BLOCK_F // PARTS
    for block in range(begin * BLOCK_F, min(begin + piece.split_blocks, piece.end_block) * BLOCK_F, BLOCK_F):
        for part in tl.static_range(PARTS):
            f0 = block + part * PART
            f = f0 + tl.arange(0, PART)
            g, u = load_pair(operands.pre_activations, (strides.gate, strides.up), token, live, f, width)
            if added is not None:
                left = piece.first_block * BLOCK_F  # the first column that is there
                inside = live[:, None] & (f < width)[None, :]
                at = token[:, None] * stride_added + (f - left)[None, :]
                g += tl.load(added.gate + at, mask=inside, other=0.0).to(tl.float32)
                u += tl.load(added.up + at, mask=inside, other=0.0).to(tl.float32)
            own = expert_hidden(g, u, low_g0, low_u0, operands, e0, f, width, scale, RANK, ACTIVATION, APPROXIMATE)
            mixed = own * w0[:, None]
            z0 = add_low_rank(z0, own, operands, token, e0, f0, width, RANK, PART)
            if SLOTS == 2:
                own = expert_hidden(g, u, low_g1, low_u1, operands, e1, f, width, scale, RANK, ACTIVATION, APPROXIMATE)
                mixed += own * w1[:, None]
                z1 = add_low_rank(z1, own, operands, token, e1, f0, width, RANK, PART)
            at = token[:, None] * width + f[None, :]
            tl.store(hidden + at, mixed.to(hidden.dtype.element_ty), mask=live[:, None] & (f < width)[None, :])

    COLUMNS: tl.constexpr = compact_columns(SLOTS, RANK)
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (tl.cast(piece.first_split + split, tl.int64) * num_positions + position)[:, None] * COLUMNS
    i = tl.arange(0, padded_rank(RANK))[None, :]
    tl.store(partial + row + i, z0 * w0[:, None])
    if SLOTS == 2:
        tl.store(partial + row + padded_rank(RANK) + i, z1 * w1[:, None])


@triton.jit(do_not_specialize=["num_positions", "splits"])
def experts_stream_sum(
    partial, expert_ids, order, low_down, num_positions, splits, num_experts,
    SLOTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """low_down [N, n*r]: the sum over the splits, first split first, at a token's experts' columns; zero elsewhere."""
    token, live = tile_rows(order, tl.program_id(0), num_positions, BLOCK_M)
    ids = row_experts(expert_ids, token, live, num_experts, SLOTS)
    rows = sum_splits(partial, tl.program_id(0), splits, num_positions, compact_columns(SLOTS, RANK), BLOCK_M)
    write_wide(rows, low_down, num_experts * RANK, ids, token, live, num_experts, SLOTS, RANK, BLOCK_M)
