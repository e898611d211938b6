"""The expert round of many tokens: a stream over F in tiles of tokens that share all their experts.

Experts are scalars of a tile, so a step's loads depend on nothing that the step before computes, and the compiler has
them under way two steps ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton_reduce import sum_splits, write_wide
from graphmoe_kernels.experts.triton_tile import (
    expert_columns,
    expert_rows,
    expert_weights,
    keep_mask,
    load_base,
    low_rank_rows,
    next_expert,
    row_experts,
    tile_rows,
)
from graphmoe_kernels.triton_activations import activate


@triton.jit
def expert_low(
    low, low_update, token, live, e, num_experts, stride_low, stride_update,
    HAS_UPDATE: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
):
    """A x of expert e for gate and for up, [BLOCK_M, RANK_PADDED] each."""
    g = low_rank_rows(
        low, low_update, token, live, e * RANK, stride_low, stride_update, HAS_UPDATE, RANK, RANK_PADDED
    )
    u = low_rank_rows(
        low, low_update, token, live, (num_experts + e) * RANK, stride_low, stride_update, HAS_UPDATE, RANK, RANK_PADDED
    )
    return g, u


@triton.jit
def expert_hidden(
    g, u, low_g, low_u, gate_B, up_B, gate_scale, up_scale, gate_bias, up_bias, e, f, width, scale,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """act(m (g + s B a) + b) * (m (u + s B a) + b) of expert e, [BLOCK_M, BLOCK_F] fp32."""
    g += scale * tl.dot(low_g, expert_columns(gate_B, e, f, width, RANK, RANK_PADDED), input_precision="ieee")
    u += scale * tl.dot(low_u, expert_columns(up_B, e, f, width, RANK, RANK_PADDED), input_precision="ieee")
    if HAS_SCALE:
        at = e.to(tl.int64) * width + f
        g *= tl.load(gate_scale + at, mask=f < width, other=0.0).to(tl.float32)[None, :]
        u *= tl.load(up_scale + at, mask=f < width, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        g += tl.load(gate_bias + f, mask=f < width, other=0.0).to(tl.float32)[None, :]
        u += tl.load(up_bias + f, mask=f < width, other=0.0).to(tl.float32)[None, :]
    return activate(g, ACTIVATION, APPROXIMATE) * u


@triton.jit
def add_low_rank(
    z, hidden, down_A, seed, token, e, f0, width, threshold, kept,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_F: tl.constexpr,
):
    """z [BLOCK_M, RANK_PADDED] plus A_e dropout(hidden) for the columns from f0 on."""
    if DROPOUT:
        keep = keep_mask(tl.load(seed), token, tl.zeros_like(token).to(tl.int32) + e, f0, threshold, BLOCK_F)
        hidden = tl.where(keep, hidden * kept, 0.0)
    a = expert_rows(down_A, e, f0 + tl.arange(0, BLOCK_F), width, RANK, RANK_PADDED)
    return tl.dot(hidden.to(down_A.dtype.element_ty), tl.trans(a), z, input_precision="ieee")


@triton.jit(do_not_specialize=["positions", "threshold", "first_block", "end_block", "split_blocks", "first_split"])
def stream_kernel(
    gate, up, added_gate, added_up, low, low_update, gate_B, up_B, down_A, gate_scale, up_scale, gate_bias, up_bias,
    weights, experts, order, seed, c, partial, positions, width, num_experts, stride_gate, stride_up, stride_added,
    stride_low, stride_update, scale, threshold, kept, first_block, end_block, split_blocks, first_split,
    SLOTS: tl.constexpr, SLOTS_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_UPDATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, PARTS: tl.constexpr,
):
    """Program (tile of ``order``, split of the column blocks first_block..end_block). Shapes as in `expert_swiglu`.

    added_gate, added_up [N, those columns]: H M^T. partial [splits, positions, COLUMNS] fp32: z of a split, slot j's at
    columns j * RANK_PADDED.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    if tl.load(order + tile * BLOCK_M) < 0:
        return  # a tile's first row is a token's, unless there are fewer tiles than programs
    token, live = tile_rows(order, tile, positions, True, BLOCK_M)
    ids = row_experts(experts, token, live, num_experts, SLOTS, SLOTS_PADDED)
    smaller = next_expert(ids, tl.full([BLOCK_M], -1, tl.int32), num_experts)
    larger = smaller if SLOTS == 1 else next_expert(ids, smaller, num_experts)
    broken = live & (larger == num_experts)  # an id that is none, or one that stands twice: NaN, so that it shows
    w0 = expert_weights(weights, ids, smaller, token, live, num_experts, SLOTS, SLOTS_PADDED)
    w1 = expert_weights(weights, ids, larger, token, live, num_experts, SLOTS, SLOTS_PADDED)
    w0 = tl.where(broken, float("nan"), w0)
    e0, e1 = tl.minimum(tl.min(smaller), num_experts - 1), tl.minimum(tl.min(larger), num_experts - 1)
    low_g0, low_u0 = expert_low(
        low, low_update, token, live, e0, num_experts, stride_low, stride_update, HAS_UPDATE, RANK, RANK_PADDED
    )
    low_g1, low_u1 = low_g0, low_u0
    if SLOTS == 2:
        low_g1, low_u1 = expert_low(
            low, low_update, token, live, e1, num_experts, stride_low, stride_update, HAS_UPDATE, RANK, RANK_PADDED
        )

    z0, z1 = tl.zeros([BLOCK_M, RANK_PADDED], tl.float32), tl.zeros([BLOCK_M, RANK_PADDED], tl.float32)
    begin = first_block + split * split_blocks
    PART: tl.constexpr = BLOCK_F // PARTS
    for block in range(begin * BLOCK_F, min(begin + split_blocks, end_block) * BLOCK_F, BLOCK_F):
        for part in tl.static_range(PARTS):
            f0 = block + part * PART
            f = f0 + tl.arange(0, PART)
            g, u = load_base(gate, up, token, live, f, width, stride_gate, stride_up)
            if HAS_STATE:
                left = first_block * BLOCK_F  # the first column that is there
                added_g, added_u = load_base(
                    added_gate - left, added_up - left, token, live, f, width, stride_added, stride_added
                )
                g, u = g + added_g, u + added_u
            hidden = expert_hidden(
                g, u, low_g0, low_u0, gate_B, up_B, gate_scale, up_scale, gate_bias, up_bias, e0, f, width, scale, RANK,
                RANK_PADDED, ACTIVATION, APPROXIMATE, HAS_SCALE, HAS_BIAS,
            )
            mixed = hidden * w0[:, None]
            z0 = add_low_rank(
                z0, hidden, down_A, seed, token, e0, f0, width, threshold, kept, RANK, RANK_PADDED, DROPOUT, PART
            )
            if SLOTS == 2:
                hidden = expert_hidden(
                    g, u, low_g1, low_u1, gate_B, up_B, gate_scale, up_scale, gate_bias, up_bias, e1, f, width, scale,
                    RANK, RANK_PADDED, ACTIVATION, APPROXIMATE, HAS_SCALE, HAS_BIAS,
                )
                mixed += hidden * w1[:, None]
                z1 = add_low_rank(
                    z1, hidden, down_A, seed, token, e1, f0, width, threshold, kept, RANK, RANK_PADDED, DROPOUT, PART
                )
            at = token[:, None] * width + f[None, :]
            tl.store(c + at, mixed.to(c.dtype.element_ty), mask=live[:, None] & (f < width)[None, :])

    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (tl.cast(first_split + split, tl.int64) * positions + position)[:, None] * COLUMNS
    i = tl.arange(0, RANK_PADDED)[None, :]
    tl.store(partial + row + i, z0 * w0[:, None])
    if SLOTS == 2:
        tl.store(partial + row + RANK_PADDED + i, z1 * w1[:, None])


@triton.jit(do_not_specialize=["positions", "splits"])
def stream_sum_kernel(
    partial, experts, order, z, positions, splits, num_experts,
    SLOTS: tl.constexpr, SLOTS_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """z [N, n*r]: the sum over the splits, first split first, at the columns of a token's experts; zero elsewhere."""
    token, live = tile_rows(order, tl.program_id(0), positions, True, BLOCK_M)
    ids = row_experts(experts, token, live, num_experts, SLOTS, SLOTS_PADDED)
    rows = sum_splits(partial, tl.program_id(0), splits, positions, COLUMNS, BLOCK_M)
    write_wide(
        rows, z, num_experts * RANK, ids, token, live, num_experts, SLOTS, RANK, RANK_PADDED, COLUMNS, BLOCK_M
    )
