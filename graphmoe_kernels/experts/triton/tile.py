"""What the expert kernels share: rows of tokens by columns of F, loaded the same way in forward and backward.

``operands`` is an `ExpertOperands` whose ``dropout`` is a `Mask`, ``strides`` a `RowStrides` (both in `layout`). What
is None in them is compiled without: no flag says so a second time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton import sizes

padded_rank = triton.constexpr_function(sizes.padded_rank)
compact_columns = triton.constexpr_function(sizes.compact_columns)


@triton.jit
def tile_rows(tile, num_tokens, BLOCK_M: tl.constexpr):
    """The tokens of a tile (int64, 0 where there is none) and which of its rows are there."""
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < num_tokens
    return tl.where(live, token, 0).to(tl.int64), live


@triton.jit
def columns_inside(f, width, WHOLE: tl.constexpr):
    """Which columns f are there: all, where the caller knows that its block is ``WHOLE``, which leaves no mask."""
    return f >= 0 if WHOLE else f < width


@triton.jit
def load_pair(pair, row_strides, token, live, f, width, WHOLE: tl.constexpr = False):
    """The same rows and columns of two tensors of activations, [BLOCK_M, columns] fp32 each."""
    inside = live[:, None] & columns_inside(f, width, WHOLE)[None, :]
    stride_gate, stride_up = row_strides
    g = tl.load(pair.gate + token[:, None] * stride_gate + f[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(pair.up + token[:, None] * stride_up + f[None, :], mask=inside, other=0.0).to(tl.float32)
    return g, u


@triton.jit
def add_fold(g, u, h, update, f, k, width, inner):
    """g and u plus h M^T for the inner columns k."""
    inside = (k < inner)[:, None] & (f < width)[None, :]
    at = f[None, :] * inner + k[:, None]
    g = tl.dot(h, tl.load(update.gate + at, mask=inside, other=0.0), g, input_precision="ieee")
    u = tl.dot(h, tl.load(update.up + at, mask=inside, other=0.0), u, input_precision="ieee")
    return g, u


@triton.jit
def base_tile(
    pre_activations, update, strides, token, live, f0, width, inner,
    PARTS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Gate and up pre-activations that all slots share, P_1 + H M^T, by parts of [BLOCK_M, BLOCK_F // PARTS] fp32.

    Two parts read a tile's H once, and what follows needs registers for one of them at a time. With one part the
    second of each pair is the first.
    """
    part: tl.constexpr = BLOCK_F // PARTS
    f = f0 + tl.arange(0, part)
    g0, u0 = load_pair(pre_activations, (strides.gate, strides.up), token, live, f, width)
    g1, u1 = g0, u0
    if PARTS == 2:
        g1, u1 = load_pair(pre_activations, (strides.gate, strides.up), token, live, f + part, width)
    if update is not None:
        for k0 in range(0, inner, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = live[:, None] & (k < inner)[None, :]
            h = tl.load(update.state + token[:, None] * strides.state + k[None, :], mask=inside, other=0.0)
            g0, u0 = add_fold(g0, u0, h, update, f, k, width, inner)
            if PARTS == 2:
                g1, u1 = add_fold(g1, u1, h, update, f + part, k, width, inner)
    if PARTS == 1:
        g1, u1 = g0, u0
    return (g0, g1), (u0, u1)


@triton.jit
def low_rank_rows(low, low_update, token, hit, column, stride_low, stride_update, RANK: tl.constexpr):
    """Columns from ``column`` on of ``low`` for the rows that are hit, zero in the others: [BLOCK_M, padded rank]."""
    i = tl.arange(0, padded_rank(RANK))
    inside = hit[:, None] & (i < RANK)[None, :]
    a = tl.load(low + token[:, None] * stride_low + (column + i)[None, :], mask=inside, other=0.0)
    if low_update is not None:
        update = tl.load(low_update + token[:, None] * stride_update + (column + i)[None, :], mask=inside, other=0.0)
        a = (a.to(tl.float32) + update.to(tl.float32)).to(a.dtype)
    return a


@triton.jit
def low_rows(operands, strides, token, hit, column, RANK: tl.constexpr):
    """`low_rank_rows` of the operands' A x, a later round's part in it."""
    return low_rank_rows(
        operands.low, operands.low_update, token, hit, column, strides.low, strides.low_update, RANK
    )


@triton.jit
def expert_columns(B, e, f, width, RANK: tl.constexpr, WHOLE: tl.constexpr = False):
    """B_e^T for columns f of B [n, F, r]: [padded rank, BLOCK_F]."""
    i = tl.arange(0, padded_rank(RANK))
    inside = (i < RANK)[:, None] & columns_inside(f, width, WHOLE)[None, :]
    return tl.load(B + e.to(tl.int64) * width * RANK + f[None, :] * RANK + i[:, None], mask=inside, other=0.0)


@triton.jit
def expert_rows(A, e, f, width, RANK: tl.constexpr, WHOLE: tl.constexpr = False):
    """A_e for columns f of A [n, r, F]: [padded rank, BLOCK_F]."""
    i = tl.arange(0, padded_rank(RANK))
    inside = (i < RANK)[:, None] & columns_inside(f, width, WHOLE)[None, :]
    return tl.load(A + e.to(tl.int64) * RANK * width + i[:, None] * width + f[None, :], mask=inside, other=0.0)


@triton.jit
def shift(g, u, biases, f, width):
    """g and u plus the biases [F], where there are any."""
    if biases is not None:
        g += tl.load(biases.gate + f, mask=f < width, other=0.0).to(tl.float32)[None, :]
        u += tl.load(biases.up + f, mask=f < width, other=0.0).to(tl.float32)[None, :]
    return g, u


@triton.jit
def keep_mask(dropout, token, e, f0, BLOCK_F: tl.constexpr):
    """Which entries of a tile dropout keeps for the rows' experts e [BLOCK_M]: [BLOCK_M, BLOCK_F].

    As `graphmoe_kernels.experts.dropout` says: one call of Philox gives eight 16-bit numbers, of eight columns.
    """
    octet = f0 // 8 + tl.arange(0, BLOCK_F // 8)
    zero = tl.zeros([token.shape[0], BLOCK_F // 8], tl.int32)
    c1 = zero + token.to(tl.int32)[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(dropout.seed), zero + octet[None, :], c1, zero + e[:, None], zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    number = tl.interleave(words & 0xFFFF, words >> 16)
    return number.to(tl.int32) >= dropout.threshold
