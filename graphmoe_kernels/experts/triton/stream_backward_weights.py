"""The backward of a streamed expert round to what belongs to experts: their B, A_D and scale vectors.

Tiles are of columns by tokens, so that products over tokens find what they read in the registers it was computed in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.stream_tile import (
    expert_backward,
    expert_matrices,
    expert_vectors,
    first_column,
    launched_tiles,
    load_base,
    placed_rows,
    placed_weights,
    scaled,
)
from graphmoe_kernels.experts.triton.tile import columns_inside, padded_rank


@triton.jit
def begin_expert(
    operands, e, f, width, num_experts, RANK: tl.constexpr, BLOCK_F: tl.constexpr, WHOLE: tl.constexpr
):
    """Sums of zero for an expert, and what is read of it: its matrices and vectors.

    The sums are of gate_B, up_B and down_A, [BLOCK_F, padded rank] each, and of its scale vectors, [BLOCK_F] each.
    """
    zero = tl.zeros([BLOCK_F, padded_rank(RANK)], tl.float32)
    vector = tl.zeros([BLOCK_F], tl.float32)
    e = tl.minimum(e, num_experts - 1)
    matrices = expert_matrices(operands, e, f, width, RANK, WHOLE)
    vectors = expert_vectors(operands.scales, e, f, width, WHOLE)
    return (zero, zero, zero, vector, vector), matrices, vectors


@triton.jit
def add_to(out, x, e, f, width, num_experts, RANK: tl.constexpr):
    """Add x [BLOCK_F, padded rank] to columns f of expert e in ``out`` [n, F, r] fp32, unless e is none."""
    i = tl.arange(0, padded_rank(RANK))
    inside = (f < width)[:, None] & (i < RANK)[None, :] & (e < num_experts)
    at = out + e.to(tl.int64) * width * RANK + f[:, None] * RANK + i[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)


@triton.jit
def add_vector_to(out, x, e, f, width, num_experts):
    """Add x [BLOCK_F] to columns f of expert e in ``out`` [n, F] fp32."""
    at = out + e.to(tl.int64) * width + f
    inside = (f < width) & (e < num_experts)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)


@triton.jit
def flush(sums, own, added, e, f, width, num_experts, scale, RANK: tl.constexpr):
    """Add a run's sums to those of its expert e in memory, from element ``own`` on."""
    gate_B, up_B, down_A, of_gate, of_up = added
    add_to(sums.gate_B + own * RANK, gate_B * scale, e, f, width, num_experts, RANK)
    add_to(sums.up_B + own * RANK, up_B * scale, e, f, width, num_experts, RANK)
    add_to(sums.down_A + own * RANK, down_A, e, f, width, num_experts, RANK)
    if sums.scales is not None:
        add_vector_to(sums.scales.gate + own, of_gate, e, f, width, num_experts)
        add_vector_to(sums.scales.up + own, of_up, e, f, width, num_experts)


@triton.jit
def load_rows(rows, tile, i, EXPERTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of a tile's i-th expert, as the tokens' kernel has left them: [BLOCK_M, padded rank] each."""
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows + (position * EXPERTS + i)[:, None] * (3 * padded_rank(RANK)) + tl.arange(0, padded_rank(RANK))[None, :]
    return tl.load(at), tl.load(at + padded_rank(RANK)), tl.load(at + 2 * padded_rank(RANK))


@triton.jit
def add_tile(
    added, g, u, d, rows, w, matrices, vectors, operands, e, token, f0, width, scale,
    ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr, WHOLE: tl.constexpr,
):
    """An expert's sums plus those of a tile: d_g and d_u times A x, and what A_D read times d_low_down."""
    gate_B, up_B, down_A, of_gate, of_up = added
    d_g, d_u, g_pre, u_pre, read, _ = expert_backward(
        g, u, d, rows, w, matrices, vectors, operands, e, token, f0, width, scale, ACTIVATION, BLOCK_F, True, WHOLE
    )
    if operands.scales is not None:
        of_gate += tl.sum(d_g * g_pre, axis=1)
        of_up += tl.sum(d_u * u_pre, axis=1)
        d_g, d_u = scaled(d_g, d_u, vectors, operands.scales, True)
    dtype = rows[0].dtype
    gate_B = tl.dot(d_g.to(dtype), rows[0], gate_B, input_precision="ieee")
    up_B = tl.dot(d_u.to(dtype), rows[1], up_B, input_precision="ieee")
    down_A = tl.dot((read * w[None, :]).to(dtype), rows[2], down_A, input_precision="ieee")
    return gate_B, up_B, down_A, of_gate, of_up


@triton.jit
def run_end_before(placed, tile):
    """The end of the run that the tile before ``tile`` is of: 0 of the first."""
    end = tl.load(placed.ends + tl.maximum(tile - 1, 0))
    return tl.where(tile > 0, end, 0)


@triton.jit(do_not_specialize=["piece"])
def experts_stream_backward_weights(
    operands, strides, placed, added, stride_added, piece, d_hidden, rows, sums, width, num_experts, scale,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    LAUNCHES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Program (one of the piece's blocks of columns, split of the launch's placed tiles, of TILE rows).

    Tiles of the same experts follow one another, a run: its sums stay in registers, and go to memory at its end. Each
    split has its own ``sums``, a `WeightSums`, zero before all launches, so that the order of a sum is fixed. With
    ``SHARED`` there is one for all splits: a run is its expert's only one of the launch, and belongs to the split that
    it begins in. rows: as the tokens' kernel has left them in its `StreamSums`.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    f0 = first_column(piece) + tl.program_id(0) * BLOCK_F
    f = f0 + tl.arange(0, BLOCK_F)
    own = 0 if SHARED else split.to(tl.int64) * num_experts * width
    PARTS: tl.constexpr = TILE // BLOCK_M
    first, used = launched_tiles(placed, piece.number, LAUNCHES)
    split_tiles = tl.cdiv(used - first, splits)
    begin, end = min(first + split * split_tiles, used), min(first + (split + 1) * split_tiles, used)
    if SHARED:
        begin = run_end_before(placed, begin)
        end = run_end_before(placed, end)
    while begin < end:
        run_end = min(tl.load(placed.ends + begin), end)
        e0, e1 = tl.load(placed.experts + begin * EXPERTS), tl.load(placed.experts + (begin + 1) * EXPERTS - 1)
        sums0, matrices0, vectors0 = begin_expert(operands, e0, f, width, num_experts, RANK, BLOCK_F, WHOLE)
        sums1, matrices1, vectors1 = begin_expert(operands, e1, f, width, num_experts, RANK, BLOCK_F, WHOLE)
        for tile in range(begin * PARTS, run_end * PARTS):
            _, token, live = placed_rows(placed, tile, SLOTS, EXPERTS, LAUNCHES, BLOCK_M)
            g, u = load_base(operands, strides, added, stride_added, piece, token, live, f, width, WHOLE)
            at = token[:, None] * width + f[None, :]
            inside = live[:, None] & columns_inside(f, width, WHOLE)[None, :]
            d = tl.load(d_hidden + at, mask=inside, other=0.0)
            g, u, d = tl.trans(g), tl.trans(u), tl.trans(d)
            sums0 = add_tile(
                sums0, g, u, d, load_rows(rows, tile, 0, EXPERTS, RANK, BLOCK_M),
                placed_weights(placed, tile, 0, EXPERTS, BLOCK_M), matrices0, vectors0, operands, e0, token, f0, width,
                scale, ACTIVATION, BLOCK_F, WHOLE,
            )
            if EXPERTS == 2:
                sums1 = add_tile(
                    sums1, g, u, d, load_rows(rows, tile, 1, EXPERTS, RANK, BLOCK_M),
                    placed_weights(placed, tile, 1, EXPERTS, BLOCK_M), matrices1, vectors1, operands, e1, token, f0,
                    width, scale, ACTIVATION, BLOCK_F, WHOLE,
                )
        flush(sums, own, sums0, e0, f, width, num_experts, scale, RANK)
        if EXPERTS == 2:
            flush(sums, own, sums1, e1, f, width, num_experts, scale, RANK)
        tl.debug_barrier()  # the next run may add to the same expert's sums
        begin = run_end
