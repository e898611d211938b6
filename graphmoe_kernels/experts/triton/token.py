"""The expert round of a token or two, forward: plain multiplications, and every load is under way before it is needed.

A program has one token and one block of columns of F. Its experts are known when it starts: their B and A_D are asked
for before the loop over the fold's columns, which hides their way. A matrix instruction would take 16 rows for one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.reduce import comes_last
from graphmoe_kernels.experts.triton.tile import compact_columns, keep_mask, padded_rank, shift
from graphmoe_kernels.triton_activations import activate


@triton.jit
def token_experts(operands, token, num_experts, SLOTS: tl.constexpr, PADDED: tl.constexpr):
    """A token's experts, which of its slots have one (no id that is none, or stood before), and the routing weights."""
    slot = tl.arange(0, PADDED)
    at = token * SLOTS + slot
    e = tl.load(operands.expert_ids + at, mask=slot < SLOTS, other=-1).to(tl.int32)
    w = tl.load(operands.routing_weights + at, mask=slot < SLOTS, other=0.0)
    before = (e[:, None] == e[None, :]) & (slot[None, :] < slot[:, None])
    there = (e >= 0) & (e < num_experts) & (tl.max(before.to(tl.int32), axis=1) == 0)
    return e, there, w


@triton.jit
def slot_low(low, stride, token, e, there, num_experts, RANK: tl.constexpr):
    """The columns of the slots' experts in a row of ``low`` [N, 2nr], gate and up, [PADDED, 1, padded rank] each."""
    i = tl.arange(0, padded_rank(RANK))[None, None, :]
    inside = there[:, None, None] & (i < RANK)
    at = low + token * stride + e[:, None, None] * RANK + i
    return tl.load(at, mask=inside, other=0.0), tl.load(at + num_experts * RANK, mask=inside, other=0.0)


@triton.jit
def add_low(low, update):
    """Their sum as the operator rounds it, in fp32."""
    return (low.to(tl.float32) + update.to(tl.float32)).to(low.dtype).to(tl.float32)


@triton.jit
def slot_B(B, e, there, f, width, RANK: tl.constexpr):
    """B of the slots' experts for columns f, [PADDED, BLOCK_F, padded rank]."""
    i = tl.arange(0, padded_rank(RANK))[None, None, :]
    inside = there[:, None, None] & (f < width)[None, :, None] & (i < RANK)
    start = (e.to(tl.int64) * width * RANK)[:, None, None]
    return tl.load(B + start + f[None, :, None] * RANK + i, mask=inside, other=0.0)


@triton.jit
def slot_A(A, e, there, f, width, RANK: tl.constexpr):
    """A of the slots' experts for columns f, [PADDED, padded rank, BLOCK_F]."""
    i = tl.arange(0, padded_rank(RANK))[None, :, None]
    inside = there[:, None, None] & (i < RANK) & (f < width)[None, None, :]
    start = (e.to(tl.int64) * RANK * width)[:, None, None]
    return tl.load(A + start + i * width + f[None, None, :], mask=inside, other=0.0)


@triton.jit
def slot_vectors(vectors, e, there, f, width):
    """The rows of ``vectors`` [n, F] of the slots' experts, [PADDED, BLOCK_F] fp32."""
    at = (e.to(tl.int64) * width)[:, None] + f[None, :]
    return tl.load(vectors + at, mask=there[:, None] & (f < width)[None, :], other=1.0).to(tl.float32)


@triton.jit
def fold_columns(update, stride, token, f, k0, width, inner, BLOCK_K: tl.constexpr):
    """H [1, BLOCK_K] and M of gate and up [BLOCK_F, BLOCK_K] for the inner columns from k0 on."""
    k = (k0 + tl.arange(0, BLOCK_K))[None, :]
    inside = (f < width)[:, None] & (k < inner)
    at = f[:, None] * inner + k
    h = tl.load(update.state + token * stride + k, mask=k < inner, other=0.0)
    return h, tl.load(update.gate + at, mask=inside, other=0.0), tl.load(update.up + at, mask=inside, other=0.0)


@triton.jit
def sum_blocks(partial, token, blocks, num_tokens, COLUMNS: tl.constexpr):
    """The sum of a token's rows in ``partial`` [blocks, N, COLUMNS], in an order that is always the same: [COLUMNS]."""
    AT_ONCE: tl.constexpr = 8192 // COLUMNS  # all blocks of most layers: their loads wait for nothing
    column = tl.arange(0, COLUMNS)[None, :]
    rows = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    for first in range(0, blocks, AT_ONCE):
        block = (first + tl.arange(0, AT_ONCE))[:, None]
        at = (block.to(tl.int64) * num_tokens + token) * COLUMNS + column
        # Past the L1 cache, which may hold what another multiprocessor has overwritten.
        rows += tl.load(partial + at, mask=block < blocks, other=0.0, cache_modifier=".cg")
    return tl.sum(rows, axis=0)


@triton.jit
def write_slots(rows, row, e, there, num_experts, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Write every slot's r values to its expert's columns of a ``row`` [n*r] of low_down, and zero elsewhere."""
    block: tl.constexpr = 256
    whole = num_experts * RANK
    dtype = row.dtype.element_ty
    for c0 in range(0, whole, block):
        c = c0 + tl.arange(0, block)
        tl.store(row + c, tl.zeros([block], dtype), mask=c < whole)
    tl.debug_barrier()  # the zeros come before the values
    i = tl.arange(0, padded_rank(RANK))[None, :]
    values = tl.reshape(rows, [PADDED, padded_rank(RANK)]).to(dtype)
    tl.store(row + e[:, None] * RANK + i, values, mask=there[:, None] & (i < RANK))


@triton.jit(do_not_specialize=["num_tokens"])
def experts_forward_token(
    operands, strides, hidden, stride_hidden, low_down, stride_low_down, partial, counters, num_tokens, width, inner,
    num_experts, scale,
    SLOTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (token, block of F). Shapes as in `graphmoe_kernels.expert_swiglu`.

    partial, fp32: [blocks, N, columns], z of a block, slot j's r values from column j * padded rank on. counters:
    zeros, one for each token, zeros again at the end.
    """
    token, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    COLUMNS: tl.constexpr = compact_columns(SLOTS, RANK)
    PADDED: tl.constexpr = COLUMNS // padded_rank(RANK)
    f0 = block * BLOCK_F
    f = f0 + tl.arange(0, BLOCK_F)
    # What depends on no expert is asked for first.
    update, stride = operands.update, strides.state
    if update is not None:
        first_h, first_gate, first_up = fold_columns(update, stride, token, f, 0, width, inner, BLOCK_K)
    g = tl.load(operands.pre_activations.gate + token * strides.gate + f, mask=f < width, other=0.0)
    u = tl.load(operands.pre_activations.up + token * strides.up + f, mask=f < width, other=0.0)
    e, there, w = token_experts(operands, token, num_experts, SLOTS, PADDED)
    low_gate, low_up = slot_low(operands.low, strides.low, token, e, there, num_experts, RANK)
    more_gate, more_up = tl.zeros_like(low_gate), tl.zeros_like(low_up)
    if operands.low_update is not None:
        more_gate, more_up = slot_low(operands.low_update, strides.low_update, token, e, there, num_experts, RANK)
    B_gate = slot_B(operands.B.gate, e, there, f, width, RANK)
    B_up = slot_B(operands.B.up, e, there, f, width, RANK)
    A = slot_A(operands.down_A, e, there, f, width, RANK)
    g, u = g.to(tl.float32), u.to(tl.float32)
    if update is not None:
        lanes_gate = tl.zeros([BLOCK_F, BLOCK_K], tl.float32)
        lanes_up = tl.zeros([BLOCK_F, BLOCK_K], tl.float32)
        for k0 in tl.range(BLOCK_K, inner, BLOCK_K, num_stages=STAGES):
            h, m_gate, m_up = fold_columns(update, stride, token, f, k0, width, inner, BLOCK_K)
            lanes_gate += h.to(tl.float32) * m_gate.to(tl.float32)
            lanes_up += h.to(tl.float32) * m_up.to(tl.float32)
        lanes_gate += first_h.to(tl.float32) * first_gate.to(tl.float32)
        lanes_up += first_h.to(tl.float32) * first_up.to(tl.float32)
        g += tl.sum(lanes_gate, axis=1)
        u += tl.sum(lanes_up, axis=1)
    slot_g = g[None, :] + scale * tl.sum(
        B_gate.to(tl.float32) * add_low(low_gate, more_gate), axis=2
    )  # [PADDED, BLOCK_F]
    slot_u = u[None, :] + scale * tl.sum(B_up.to(tl.float32) * add_low(low_up, more_up), axis=2)
    if operands.scales is not None:
        slot_g *= slot_vectors(operands.scales.gate, e, there, f, width)
        slot_u *= slot_vectors(operands.scales.up, e, there, f, width)
    slot_g, slot_u = shift(slot_g, slot_u, operands.biases, f, width)
    own = activate(slot_g, ACTIVATION) * slot_u
    w = tl.where(there, w.to(tl.float32), float("nan"))  # an id that is none makes its token NaN, so that it shows
    own = tl.where((tl.arange(0, PADDED) < SLOTS)[:, None], own * w[:, None], 0.0)
    tl.store(hidden + token * stride_hidden + f, tl.sum(own, axis=0).to(hidden.dtype.element_ty), mask=f < width)
    if operands.dropout is not None:
        keep = keep_mask(operands.dropout, tl.zeros([PADDED], tl.int64) + token, e, f0, BLOCK_F)
        own = tl.where(keep, own * operands.dropout.kept, 0.0)
    own = own.to(hidden.dtype.element_ty).to(tl.float32)
    z = tl.sum(A.to(tl.float32) * own[:, None, :], axis=2)  # [PADDED, padded rank]
    at = (block.to(tl.int64) * num_tokens + token) * COLUMNS
    column = tl.arange(0, PADDED)[:, None] * padded_rank(RANK) + tl.arange(0, padded_rank(RANK))[None, :]
    tl.store(partial + at + column, z)
    if comes_last(counters, token, blocks):
        rows = sum_blocks(partial, token, blocks, num_tokens, COLUMNS)
        write_slots(rows, low_down + token * stride_low_down, e, there, num_experts, RANK, PADDED)
