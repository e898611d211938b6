"""The expert round of 3 to 64 tokens, forward: one tile of tokens by one block of columns in a program.

The experts of a tile are found when the program starts, and several are visited at once, side by side in one product:
the first of them (all, where n is small) are asked for before the loop over the fold's columns, which hides their way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.reduce import reduce_splits, write_wide
from graphmoe_kernels.experts.triton.tile import (
    add_fold,
    compact_columns,
    expert_weights,
    keep_mask,
    next_expert,
    padded_rank,
    row_experts,
    shift,
    tile_rows,
)
from graphmoe_kernels.triton_activations import activate


@triton.jit
def count_before(ids, num_experts, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Which experts a tile has, [BLOCK_E] int32, and how many come before each."""
    expert = tl.arange(0, BLOCK_E)
    chosen = tl.full([BLOCK_M], -1, tl.int32)
    present = tl.zeros([BLOCK_E], tl.int32)
    for _ in range(SLOTS):
        chosen = next_expert(ids, chosen, num_experts)
        here = (chosen[:, None] == expert[None, :]) & (expert < num_experts)[None, :]
        present = tl.maximum(present, tl.max(here.to(tl.int32), axis=0))
    return present, tl.cumsum(present, axis=0) - present


@triton.jit
def visited(present, before, first, num_experts, RANK: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_E: tl.constexpr):
    """The experts of the columns of a visit to those from the ``first`` on, [AT_ONCE * padded rank]; n for none."""
    place = first + tl.arange(0, AT_ONCE)
    hit = (before[None, :] == place[:, None]) & (present > 0)[None, :]
    e = tl.min(tl.where(hit, tl.arange(0, BLOCK_E)[None, :], num_experts), axis=1)
    wide = tl.broadcast_to(e[:, None], [AT_ONCE, padded_rank(RANK)])
    return tl.reshape(wide, [AT_ONCE * padded_rank(RANK)])


@triton.jit
def visit_B(B, e, f, width, num_experts, RANK: tl.constexpr):
    """B of the visited experts for columns f, [columns of the visit, BLOCK_F]."""
    i = tl.arange(0, e.shape[0]) % padded_rank(RANK)
    inside = ((e < num_experts) & (i < RANK))[:, None] & (f < width)[None, :]
    at = (e.to(tl.int64) * width * RANK + i)[:, None] + f[None, :] * RANK
    return tl.load(B + at, mask=inside, other=0.0)


@triton.jit
def visit_A(A, e, f, width, num_experts, RANK: tl.constexpr):
    """A of the visited experts for columns f, [columns of the visit, BLOCK_F]."""
    i = tl.arange(0, e.shape[0]) % padded_rank(RANK)
    inside = ((e < num_experts) & (i < RANK))[:, None] & (f < width)[None, :]
    at = (e.to(tl.int64) * RANK * width + i * width)[:, None] + f[None, :]
    return tl.load(A + at, mask=inside, other=0.0)


@triton.jit
def visit_low(operands, strides, token, chosen, e, side, RANK: tl.constexpr):
    """A x of the rows whose expert is visited, zero in the others. ``side``: 0 for gate's, n*r for up's."""
    i = tl.arange(0, e.shape[0]) % padded_rank(RANK)
    inside = (chosen[:, None] == e[None, :]) & (i < RANK)[None, :]
    column = (side + e * RANK + i)[None, :]
    a = tl.load(operands.low + token[:, None] * strides.low + column, mask=inside, other=0.0)
    if operands.low_update is not None:
        more = tl.load(operands.low_update + token[:, None] * strides.low_update + column, mask=inside, other=0.0)
        a = (a.to(tl.float32) + more.to(tl.float32)).to(a.dtype)
    return a


@triton.jit
def add_visit(g, u, operands, strides, token, chosen, e, B_gate, B_up, num_experts, RANK: tl.constexpr):
    """g and u, without scale, plus B a of the rows whose expert is visited."""
    a = visit_low(operands, strides, token, chosen, e, 0, RANK)
    g = tl.dot(a, B_gate, g, input_precision="ieee")
    a = visit_low(operands, strides, token, chosen, e, num_experts * RANK, RANK)
    return g, tl.dot(a, B_up, u, input_precision="ieee")


@triton.jit
def visit_z(own, A, chosen, e, RANK: tl.constexpr, AT_ONCE: tl.constexpr):
    """A own of the rows whose expert is visited, zero in the others: [BLOCK_M, padded rank]."""
    z = tl.dot(own, tl.trans(A), input_precision="ieee")
    z = tl.where(chosen[:, None] == e[None, :], z, 0.0)
    return tl.sum(tl.reshape(z, [own.shape[0], AT_ONCE, padded_rank(RANK)]), axis=1)


@triton.jit
def row_vectors(vectors, chosen, f, width, num_experts):
    """The rows of ``vectors`` [n, F] of every row's expert, [BLOCK_M, BLOCK_F] fp32."""
    inside = (chosen < num_experts)[:, None] & (f < width)[None, :]
    return tl.load(vectors + chosen.to(tl.int64)[:, None] * width + f[None, :], mask=inside, other=1.0).to(tl.float32)


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
    token, live = tile_rows(tile, num_tokens, BLOCK_M)
    f0 = block * BLOCK_F
    f = f0 + tl.arange(0, BLOCK_F)
    inside = live[:, None] & (f < width)[None, :]
    p_gate = tl.load(operands.pre_activations.gate + token[:, None] * strides.gate + f[None, :], mask=inside, other=0.0)
    p_up = tl.load(operands.pre_activations.up + token[:, None] * strides.up + f[None, :], mask=inside, other=0.0)
    ids = row_experts(operands.expert_ids, token, live, num_experts, SLOTS)
    present, before = count_before(ids, num_experts, SLOTS, BLOCK_M, BLOCK_E)
    count = tl.sum(present, axis=0)
    e = visited(present, before, 0, num_experts, RANK, AT_ONCE, BLOCK_E)
    B_gate = visit_B(operands.B.gate, e, f, width, num_experts, RANK)
    B_up = visit_B(operands.B.up, e, f, width, num_experts, RANK)
    A = visit_A(operands.down_A, e, f, width, num_experts, RANK)
    g, u = tl.zeros([BLOCK_M, BLOCK_F], tl.float32), tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    if operands.update is not None:
        for k0 in range(0, inner, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            k_inside = live[:, None] & (k < inner)[None, :]
            at = operands.update.state + token[:, None] * strides.state + k[None, :]
            g, u = add_fold(g, u, tl.load(at, mask=k_inside, other=0.0), operands.update, f, k, width, inner)
    g, u = g + p_gate.to(tl.float32), u + p_up.to(tl.float32)

    mixed = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    chosen = tl.full([BLOCK_M], -1, tl.int32)
    row = (block.to(tl.int64) * num_tokens + token)[:, None] * COLUMNS + tl.arange(0, padded_rank(RANK))[None, :]
    for slot in range(SLOTS):
        chosen = next_expert(ids, chosen, num_experts)
        low_g, low_u = tl.zeros_like(g), tl.zeros_like(u)
        low_g, low_u = add_visit(low_g, low_u, operands, strides, token, chosen, e, B_gate, B_up, num_experts, RANK)
        for first in range(AT_ONCE, count, AT_ONCE):
            more = visited(present, before, first, num_experts, RANK, AT_ONCE, BLOCK_E)
            more_gate = visit_B(operands.B.gate, more, f, width, num_experts, RANK)
            more_up = visit_B(operands.B.up, more, f, width, num_experts, RANK)
            low_g, low_u = add_visit(
                low_g, low_u, operands, strides, token, chosen, more, more_gate, more_up, num_experts, RANK
            )
        slot_g, slot_u = g + scale * low_g, u + scale * low_u
        if operands.scales is not None:
            slot_g *= row_vectors(operands.scales.gate, chosen, f, width, num_experts)
            slot_u *= row_vectors(operands.scales.up, chosen, f, width, num_experts)
        slot_g, slot_u = shift(slot_g, slot_u, operands.biases, f, width)
        w = expert_weights(operands.routing_weights, ids, chosen, token, live, num_experts, SLOTS)
        own = activate(slot_g, ACTIVATION) * slot_u * w[:, None]
        mixed += own
        if operands.dropout is not None:
            keep = keep_mask(operands.dropout, token, chosen, f0, BLOCK_F)
            own = tl.where(keep, own * operands.dropout.kept, 0.0)
        own = own.to(hidden.dtype.element_ty)
        z = visit_z(own, A, chosen, e, RANK, AT_ONCE)
        for first in range(AT_ONCE, count, AT_ONCE):
            more = visited(present, before, first, num_experts, RANK, AT_ONCE, BLOCK_E)
            z += visit_z(own, visit_A(operands.down_A, more, f, width, num_experts, RANK), chosen, more, RANK, AT_ONCE)
        tl.store(partial + row + slot * padded_rank(RANK), z, mask=live[:, None])
    tl.store(hidden + token[:, None] * stride_hidden + f[None, :], mixed.to(hidden.dtype.element_ty), mask=inside)
    last, z_rows = reduce_splits(partial, counters, tile, block, blocks, num_tokens, COLUMNS, BLOCK_M)
    if last:
        write_wide(z_rows, low_down, stride_low_down, ids, token, live, num_experts, SLOTS, RANK, BLOCK_M)
