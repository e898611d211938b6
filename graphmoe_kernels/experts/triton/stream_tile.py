"""What the kernels of a stream share: a tile of rows that have their experts in common, by columns of F.

A row is a token with all its experts, or one slot of a token with one expert (`sizes.Tiling`). ``placed`` is a
`placing.Placed`: experts are scalars of a tile, the first is the smaller. ``operands`` and ``strides`` are as in
`tile`. ``added`` is a pair [N, the piece's columns], H M^T, or None; ``piece`` a `stream_plan.Piece`. ``WHOLE`` says
that blocks of columns fill F.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton import sizes
from graphmoe_kernels.experts.triton.tile import (
    columns_inside,
    expert_columns,
    expert_rows,
    keep_mask,
    load_pair,
    low_rank_rows,
    low_rows,
)
from graphmoe_kernels.triton_activations import activate, differentiate

STREAM_BLOCK = tl.constexpr(sizes.STREAM_BLOCK)


@triton.jit
def stream_columns(piece, split):
    """The first of a split's columns, and the one after its last."""
    begin = piece.first_block + split * piece.split_blocks
    return begin * STREAM_BLOCK, min(begin + piece.split_blocks, piece.end_block) * STREAM_BLOCK


@triton.jit
def launched_tiles(placed, number, LAUNCHES: tl.constexpr):
    """The first tile of a launch, by its number, and the one after its last."""
    begin = number * 0
    if LAUNCHES > 1:
        begin = tl.where(number > 0, tl.load(placed.used + tl.maximum(number - 1, 0)), 0)
    return begin, tl.load(placed.used + number)


@triton.jit
def placed_rows(
    placed, tile, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, LAUNCHES: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Where the rows of a tile are written, their tokens (int64, 0 where there is none), and which of them are there.

    What a token's rows of one launch give is written row by row, a single one's at its token.
    """
    row = tl.load(placed.rows + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    live = row >= 0
    row = tl.where(live, row, 0)
    token = (row // (SLOTS // EXPERTS)).to(tl.int64)
    return token if LAUNCHES > 1 else row.to(tl.int64), token, live


@triton.jit
def add_written(x, out, at, number, inside, LAUNCHES: tl.constexpr):
    """x plus what the launches before this one have written to ``out``."""
    if LAUNCHES > 1:
        x += tl.load(out + at, mask=inside & (number > 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def placed_expert(placed, tile, i, EXPERTS: tl.constexpr):
    """The i-th expert of a tile; num_experts for ids that are none."""
    return tl.load(placed.experts + tile * EXPERTS + i)


@triton.jit
def placed_weights(placed, tile, i, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The routing weights of a tile's rows for its i-th expert, 0 where there is no row: [BLOCK_M] fp32."""
    position = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.load(placed.weights + position * EXPERTS + i)


@triton.jit
def first_column(piece):
    """The first column of a piece: where its buffers, and the views that a launch gets of wider ones, begin."""
    return piece.first_block * STREAM_BLOCK


@triton.jit
def expert_low_rows(operands, strides, token, live, e, num_experts, RANK: tl.constexpr):
    """A x of expert e for gate and up, [BLOCK_M, padded rank] each."""
    gate = low_rows(operands, strides, token, live, e * RANK, RANK)
    return gate, low_rows(operands, strides, token, live, (num_experts + e) * RANK, RANK)


@triton.jit
def load_base(
    operands, strides, added, stride_added, piece, token, live, f, width, WHOLE: tl.constexpr = False
):
    """P_1 + H M^T, the pre-activations that all experts share, [BLOCK_M, columns] fp32 each."""
    g, u = load_pair(operands.pre_activations, (strides.gate, strides.up), token, live, f, width, WHOLE)
    if added is not None:
        inside = live[:, None] & columns_inside(f, width, WHOLE)[None, :]
        at = token[:, None] * stride_added + (f - first_column(piece))[None, :]
        g += tl.load(added.gate + at, mask=inside, other=0.0).to(tl.float32)
        u += tl.load(added.up + at, mask=inside, other=0.0).to(tl.float32)
    return g, u


@triton.jit
def expert_matrices(operands, e, f, width, RANK: tl.constexpr, WHOLE: tl.constexpr):
    """Expert e's B^T of gate and up and its A_D, for columns f: [padded rank, columns] each."""
    gate = expert_columns(operands.B.gate, e, f, width, RANK, WHOLE)
    up = expert_columns(operands.B.up, e, f, width, RANK, WHOLE)
    return gate, up, expert_rows(operands.down_A, e, f, width, RANK, WHOLE)


@triton.jit
def load_vectors(pair, f, width, WHOLE: tl.constexpr):
    """Columns f of a pair of vectors, fp32."""
    inside = columns_inside(f, width, WHOLE)
    gate = tl.load(pair.gate + f, mask=inside, other=0.0).to(tl.float32)
    return gate, tl.load(pair.up + f, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def expert_vectors(scales, e, f, width, WHOLE: tl.constexpr = False):
    """Expert e's scale vectors of gate and up [columns] fp32; where there are none, what nobody reads."""
    gate, up = f, f
    if scales is not None:
        at, inside = e.to(tl.int64) * width + f, columns_inside(f, width, WHOLE)
        gate = tl.load(scales.gate + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(scales.up + at, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def scaled(g, u, vectors, scales, BY_COLUMN: tl.constexpr = False):
    """g and u, tiles as in `expert_backward`, times an expert's vectors where there are any."""
    if scales is not None:
        g *= along_columns(vectors[0], BY_COLUMN)
        u *= along_columns(vectors[1], BY_COLUMN)
    return g, u


@triton.jit
def along_columns(vector, BY_COLUMN: tl.constexpr):
    """A vector of columns, to be broadcast over the tokens of a tile."""
    return vector[:, None] if BY_COLUMN else vector[None, :]


@triton.jit
def low_rank_product(rows, matrix, BY_COLUMN: tl.constexpr):
    """rows [BLOCK_M, padded rank] times matrix [padded rank, columns]."""
    if BY_COLUMN:
        product = tl.dot(tl.trans(matrix), tl.trans(rows), input_precision="ieee")
    else:
        product = tl.dot(rows, matrix, input_precision="ieee")
    return product


@triton.jit
def expert_backward(
    g, u, d_hidden, rows, w, matrices, vectors, operands, e, token, f0, width, scale,
    ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr, BY_COLUMN: tl.constexpr, WHOLE: tl.constexpr,
):
    """Recompute an expert in the columns from f0 on and differentiate it; nothing wide was saved.

    g, u, d_hidden: tiles of tokens by columns, or of columns by tokens with ``BY_COLUMN``, and so are the results:
    a product that sums over the columns takes what it reads from the registers of the first, one over the tokens from
    those of the second. rows: as `gradient_rows`; w [BLOCK_M], the routing weights; matrices and vectors are the
    expert's. Returns the gradients of the pre-activations after their scale vectors, the pre-activations before those,
    what A_D read (after dropout, without the routing weight), and its product with what it gets a gradient of.
    """
    f = f0 + tl.arange(0, BLOCK_F)
    g_pre = g + scale * low_rank_product(rows[0], matrices[0], BY_COLUMN)
    u_pre = u + scale * low_rank_product(rows[1], matrices[1], BY_COLUMN)
    g, u = scaled(g_pre, u_pre, vectors, operands.scales, BY_COLUMN)
    if operands.biases is not None:
        gate, up = load_vectors(operands.biases, f, width, WHOLE)
        g += along_columns(gate, BY_COLUMN)
        u += along_columns(up, BY_COLUMN)
    active = activate(g, ACTIVATION)
    own = active * u
    d_own = low_rank_product(rows[2], matrices[2], BY_COLUMN)
    read = own
    if operands.dropout is not None:
        keep = keep_mask(operands.dropout, token, tl.zeros_like(token).to(tl.int32) + e, f0, BLOCK_F)
        if BY_COLUMN:
            keep = tl.trans(keep)
        d_own = tl.where(keep, d_own * operands.dropout.kept, 0.0)
        read = tl.where(keep, own * operands.dropout.kept, 0.0)
    d_own -= -d_hidden.to(tl.float32)  # as a sum it would be the product's accumulator, whose load is not pipelined
    of_weight = own * d_own
    d_own *= w[None, :] if BY_COLUMN else w[:, None]
    return d_own * u * differentiate(g, ACTIVATION), d_own * active, g_pre, u_pre, read, of_weight


@triton.jit
def gradient_rows(operands, strides, d_low_down, token, live, e, num_experts, RANK: tl.constexpr):
    """A x of expert e for gate and up, and the gradient of what it gave to low_down: [BLOCK_M, padded rank] each."""
    gate, up = expert_low_rows(operands, strides, token, live, e, num_experts, RANK)
    return gate, up, low_rank_rows(d_low_down, None, token, live, e * RANK, num_experts * RANK, 0, RANK)
