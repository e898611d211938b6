"""The expert round of few tokens, forward: one tile of tokens by one block of columns in a program.

Rows are pairs of a slot and a token, so that all slots share each product. The experts of a tile are found when the
program starts, and a few are visited at once, side by side in one product. The loops over the fold's columns and over
visits ask for what later passes read before they wait for their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.reduce import clear_wide, reduce_splits, write_slots
from graphmoe_kernels.experts.triton.tile import (
    add_fold,
    compact_columns,
    keep_mask,
    padded_rank,
    shift,
    tile_rows,
)
from graphmoe_kernels.triton_activations import activate


@triton.jit
def slot_rows(tile, num_tokens, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr):
    """The rows of a tile, [PADDED * BLOCK_M], a slot's tokens side by side: token, slot, which of them are there."""
    row = tl.arange(0, PADDED * BLOCK_M)
    token, slot = tile * BLOCK_M + row % BLOCK_M, row // BLOCK_M
    live = (token < num_tokens) & (slot < SLOTS)
    return tl.where(live, token, 0).to(tl.int64), tl.where(live, slot, 0), live


@triton.jit
def slot_experts(expert_ids, token, slot, live, num_experts, SLOTS: tl.constexpr):
    """Every row's expert; num_experts for an id that is none, or stood in a slot of the token before."""
    e = tl.load(expert_ids + token * SLOTS + slot, mask=live, other=0).to(tl.int32)
    real = live & (e >= 0) & (e < num_experts)
    for before in tl.static_range(SLOTS - 1):
        other = tl.load(expert_ids + token * SLOTS + before, mask=live & (before < slot), other=0).to(tl.int32)
        real = real & ((e != other) | (before >= slot))
    return tl.where(real, e, num_experts)


@triton.jit
def slot_low(operands, strides, token, real, column, RANK: tl.constexpr):
    """A x from every row's own ``column`` on, zero in rows that are not ``real``: [ROWS, padded rank]."""
    i = tl.arange(0, padded_rank(RANK))
    inside, columns = real[:, None] & (i < RANK)[None, :], column[:, None] + i[None, :]
    a = tl.load(operands.low + token[:, None] * strides.low + columns, mask=inside, other=0.0)
    if operands.low_update is not None:
        more = tl.load(operands.low_update + token[:, None] * strides.low_update + columns, mask=inside, other=0.0)
        a = (a.to(tl.float32) + more.to(tl.float32)).to(a.dtype)
    return a


@triton.jit
def order_experts(e, num_experts, BLOCK_E: tl.constexpr):
    """The place of every expert among those that the rows have, [BLOCK_E] int32, -1 if no row has it; how many have."""
    expert = tl.arange(0, BLOCK_E)
    here = (e[:, None] == expert[None, :]) & (expert < num_experts)[None, :]
    present = tl.max(here.to(tl.int32), axis=0)
    return tl.where(present > 0, tl.cumsum(present, axis=0) - 1, -1), tl.sum(present, axis=0)


@triton.jit
def visited(places, first, num_experts, RANK: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_E: tl.constexpr):
    """The experts of a visit, in places from the ``first`` on, [AT_ONCE], and of its columns; num_experts for none."""
    hit = places[None, :] == first + tl.arange(0, AT_ONCE)[:, None]
    e = tl.min(tl.where(hit, tl.arange(0, BLOCK_E)[None, :], num_experts), axis=1)
    columns = tl.broadcast_to(e[:, None], [AT_ONCE, padded_rank(RANK)])
    return e, tl.max_constancy(tl.reshape(columns, [AT_ONCE * padded_rank(RANK)]), padded_rank(RANK))


@triton.jit
def visit_B(B, e, f, width, num_experts, RANK: tl.constexpr):
    """B of the experts e of a visit's columns for columns f, [AT_ONCE * padded rank, BLOCK_F]."""
    i = tl.arange(0, e.shape[0]) % padded_rank(RANK)
    inside = ((e < num_experts) & (i < RANK))[:, None] & (f < width)[None, :]
    at = (e.to(tl.int64) * width * RANK + i)[:, None] + f[None, :] * RANK
    return tl.load(B + at, mask=inside, other=0.0)


@triton.jit
def visit_A(A, e, f, width, num_experts, RANK: tl.constexpr):
    """A of the experts e of a visit's columns for columns f, [AT_ONCE * padded rank, BLOCK_F]."""
    i = tl.arange(0, e.shape[0]) % padded_rank(RANK)
    inside = ((e < num_experts) & (i < RANK))[:, None] & (f < width)[None, :]
    at = (e.to(tl.int64) * RANK * width + i * width)[:, None] + f[None, :]
    return tl.load(A + at, mask=inside, other=0.0)


@triton.jit
def side_by_side(a, own, e):
    """Rows a [ROWS, padded rank] in those columns of a visit whose expert is the row's ``own``, zero in the others."""
    wide = tl.where((own[:, None] == e[None, :])[:, :, None], a[:, None, :], 0.0)
    return tl.reshape(wide, [a.shape[0], e.shape[0] * a.shape[1]])


@triton.jit
def add_visit(g, u, a_gate, a_up, own, e, B_gate, B_up):
    """g and u, without scale, plus B a of the rows whose expert is visited."""
    g = tl.dot(side_by_side(a_gate, own, e), B_gate, g, input_precision="ieee")
    return g, tl.dot(side_by_side(a_up, own, e), B_up, u, input_precision="ieee")


@triton.jit
def visit_z(hidden, A, own, e, RANK: tl.constexpr):
    """A hidden of the rows whose expert is visited, zero in the others: [ROWS, padded rank]."""
    z = tl.dot(hidden, tl.trans(A), input_precision="ieee")
    z = tl.reshape(z, [z.shape[0], e.shape[0], padded_rank(RANK)])
    return tl.sum(tl.where((own[:, None] == e[None, :])[:, :, None], z, 0.0), axis=1)


@triton.jit
def row_vectors(vectors, e, f, width, num_experts):
    """The rows of ``vectors`` [n, F] of every row's expert, [ROWS, BLOCK_F] fp32."""
    inside = (e < num_experts)[:, None] & (f < width)[None, :]
    return tl.load(vectors + e.to(tl.int64)[:, None] * width + f[None, :], mask=inside, other=1.0).to(tl.float32)


@triton.jit
def every_slot(x, PADDED: tl.constexpr):
    """x [BLOCK_M, BLOCK_F] for the rows of every slot, [PADDED * BLOCK_M, BLOCK_F]."""
    wide = tl.broadcast_to(x[None, :, :], [PADDED, x.shape[0], x.shape[1]])
    return tl.reshape(wide, [PADDED * x.shape[0], x.shape[1]])


@triton.jit(do_not_specialize=["num_tokens"])
def experts_forward(
    operands, strides, hidden, stride_hidden, low_down, stride_low_down, partial, counters, num_tokens, width, inner,
    num_experts, scale,
    SLOTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, AT_ONCE: tl.constexpr,
):
    """Program (tile of tokens, block of F). Shapes as in `graphmoe_kernels.expert_swiglu`.

    partial, fp32: [blocks, N, columns], z of a block, slot j's r values from column j * padded rank on. counters:
    zeros, as many as `reduce_splits` takes, zeros again at the end.
    """
    tile, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    COLUMNS: tl.constexpr = compact_columns(SLOTS, RANK)
    PADDED: tl.constexpr = COLUMNS // padded_rank(RANK)
    row_token, slot, there = slot_rows(tile, num_tokens, SLOTS, BLOCK_M, PADDED)
    own = slot_experts(operands.expert_ids, row_token, slot, there, num_experts, SLOTS)
    w = tl.load(operands.routing_weights + row_token * SLOTS + slot, mask=there, other=0.0).to(tl.float32)
    token, live = tile_rows(tile, num_tokens, BLOCK_M)
    f0 = block * BLOCK_F
    f = f0 + tl.arange(0, BLOCK_F)
    inside = live[:, None] & (f < width)[None, :]
    p_gate = tl.load(operands.pre_activations.gate + token[:, None] * strides.gate + f[None, :], mask=inside, other=0.0)
    p_up = tl.load(operands.pre_activations.up + token[:, None] * strides.up + f[None, :], mask=inside, other=0.0)
    real = own < num_experts
    a_gate = slot_low(operands, strides, row_token, real, own * RANK, RANK)
    a_up = slot_low(operands, strides, row_token, real, (num_experts + own) * RANK, RANK)
    places, count = order_experts(own, num_experts, BLOCK_E)
    clear_wide(low_down, stride_low_down, token, live, block, blocks, num_experts * RANK, BLOCK_M)
    g, u = tl.zeros([BLOCK_M, BLOCK_F], tl.float32), tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    if operands.update is not None:
        for k0 in range(0, inner, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            k_inside = live[:, None] & (k < inner)[None, :]
            at = operands.update.state + token[:, None] * strides.state + k[None, :]
            g, u = add_fold(g, u, tl.load(at, mask=k_inside, other=0.0), operands.update, f, k, width, inner)

    low_g = tl.zeros([PADDED * BLOCK_M, BLOCK_F], tl.float32)
    low_u = low_g
    for first in range(0, count, AT_ONCE):
        e, columns = visited(places, first, num_experts, RANK, AT_ONCE, BLOCK_E)
        B_gate = visit_B(operands.B.gate, columns, f, width, num_experts, RANK)
        B_up = visit_B(operands.B.up, columns, f, width, num_experts, RANK)
        low_g, low_u = add_visit(low_g, low_u, a_gate, a_up, own, e, B_gate, B_up)
    g = every_slot(g + p_gate.to(tl.float32), PADDED) + scale * low_g
    u = every_slot(u + p_up.to(tl.float32), PADDED) + scale * low_u
    if operands.scales is not None:
        g *= row_vectors(operands.scales.gate, own, f, width, num_experts)
        u *= row_vectors(operands.scales.up, own, f, width, num_experts)
    g, u = shift(g, u, operands.biases, f, width)
    w = tl.where(there & (own == num_experts), float("nan"), w)  # an id that is none shows
    h = activate(g, ACTIVATION) * u * w[:, None]
    h = tl.where(there[:, None], h, 0.0)
    mixed = tl.sum(tl.reshape(h, [PADDED, BLOCK_M, BLOCK_F]), axis=0)
    tl.store(hidden + token[:, None] * stride_hidden + f[None, :], mixed.to(hidden.dtype.element_ty), mask=inside)
    if operands.dropout is not None:
        keep = keep_mask(operands.dropout, row_token, own, f0, BLOCK_F)
        h = tl.where(keep, h * operands.dropout.kept, 0.0)
    h = h.to(hidden.dtype.element_ty)
    z = tl.zeros([PADDED * BLOCK_M, padded_rank(RANK)], tl.float32)
    for first in range(0, count, AT_ONCE):
        e, columns = visited(places, first, num_experts, RANK, AT_ONCE, BLOCK_E)
        z += visit_z(h, visit_A(operands.down_A, columns, f, width, num_experts, RANK), own, e, RANK)
    row = (block.to(tl.int64) * num_tokens + row_token) * COLUMNS + slot * padded_rank(RANK)
    tl.store(partial + row[:, None] + tl.arange(0, padded_rank(RANK))[None, :], z, mask=there[:, None])
    last, rows = reduce_splits(partial, counters, tile, block, blocks, num_tokens, COLUMNS, BLOCK_M)
    if last:
        write_slots(rows, low_down, stride_low_down, token, own, num_experts, RANK, BLOCK_M)
