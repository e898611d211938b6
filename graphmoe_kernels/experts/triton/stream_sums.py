"""What the splits of a stream leave, summed for every token: low_down, and the gradients of its low-rank operands."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.tile import compact_columns, padded_rank


@triton.jit
def slot_places(
    expert_ids, places, token, live, slot, num_experts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr
):
    """A slot's expert (num_experts for none), its position, and which expert of its tile it is: [BLOCK_M] each."""
    ids = expert_ids + token * SLOTS
    e = tl.load(ids + slot, mask=live, other=num_experts).to(tl.int32)
    e = tl.where((e >= 0) & (e < num_experts), e, num_experts)
    i = tl.zeros_like(e)
    if EXPERTS == 2:
        i = (tl.load(ids + 1 - slot, mask=live, other=0).to(tl.int32) < e).to(tl.int32)
    row = token * (SLOTS // EXPERTS) + (0 if EXPERTS == 2 else slot)
    return e, tl.load(places + row, mask=live, other=0).to(tl.int64), i


@triton.jit
def sum_over_splits(partial, at, inside, splits, stride_split):
    """The sum of ``partial``'s elements ``at`` over the splits, first split first."""
    found = tl.zeros(at.shape, tl.float32)
    for split in range(splits):
        found += tl.load(partial + tl.cast(split, tl.int64) * stride_split + at, mask=inside, other=0.0)
    return found


@triton.jit
def clear(out, token, live, whole, BLOCK_M: tl.constexpr):
    """Write zeros to the tokens' rows of ``out`` [N, whole], before values come to some of their columns."""
    BLOCK: tl.constexpr = 64
    zero = tl.zeros([BLOCK_M, BLOCK], out.dtype.element_ty)
    for c0 in range(0, whole, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        tl.store(out + token[:, None] * whole + c[None, :], zero, mask=live[:, None] & (c < whole)[None, :])
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "splits"])
def experts_stream_sum(
    partial, expert_ids, places, low_down, num_tokens, num_positions, splits, num_experts,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """low_down [N, n*r]: at a token's experts' columns what its splits add to it, zero elsewhere."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < num_tokens
    clear(low_down, token, live, num_experts * RANK, BLOCK_M)
    i = tl.arange(0, padded_rank(RANK))[None, :]
    COLUMNS: tl.constexpr = compact_columns(EXPERTS, RANK)
    for slot in range(SLOTS):
        e, place, part = slot_places(expert_ids, places, token, live, slot, num_experts, SLOTS, EXPERTS)
        inside = (live & (e < num_experts))[:, None] & (i < RANK)
        at = (place * COLUMNS + part * padded_rank(RANK))[:, None] + i
        z = sum_over_splits(partial, at, inside, splits, num_positions.to(tl.int64) * COLUMNS)
        out = low_down + (token * num_experts + e)[:, None] * RANK + i
        tl.store(out, z.to(low_down.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "splits"])
def experts_stream_sum_tokens(
    sums, expert_ids, places, d_low, d_routing_weights, num_tokens, num_positions, splits, num_experts, scale,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """d_low [N, 2nr] and d_routing_weights [N, k] of a `StreamSums`."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < num_tokens
    clear(d_low, token, live, 2 * num_experts * RANK, BLOCK_M)
    i = tl.arange(0, padded_rank(RANK))[None, :]
    COLUMNS: tl.constexpr = compact_columns(EXPERTS, RANK)
    stride_split = num_positions.to(tl.int64) * COLUMNS
    for slot in range(SLOTS):
        e, place, part = slot_places(expert_ids, places, token, live, slot, num_experts, SLOTS, EXPERTS)
        inside = (live & (e < num_experts))[:, None] & (i < RANK)
        at = (place * COLUMNS + part * padded_rank(RANK))[:, None] + i
        gate = sum_over_splits(sums.gate, at, inside, splits, stride_split) * scale
        up = sum_over_splits(sums.up, at, inside, splits, stride_split) * scale
        out = d_low + (token * 2 * num_experts + e)[:, None] * RANK + i
        tl.store(out, gate.to(d_low.dtype.element_ty), mask=inside)
        tl.store(out + num_experts * RANK, up.to(d_low.dtype.element_ty), mask=inside)
        of_weight = sum_over_splits(
            sums.routing_weights, place * EXPERTS + part, live, splits, num_positions.to(tl.int64) * EXPERTS
        )
        tl.store(d_routing_weights + token * SLOTS + slot, of_weight, mask=live)
