"""Sums over the splits of F in a fixed order, by the program of a tile that comes last (`counters` counts them)."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.sizes import SUMMED_AT_ONCE
from graphmoe_kernels.experts.triton.tile import compact_columns, next_expert, padded_rank

GROUP = tl.constexpr(SUMMED_AT_ONCE)


@triton.jit
def split_offsets(tile, num_tokens, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a tile's rows stand in one split's [num_tokens, COLUMNS], and which of them are there."""
    position = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return position[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], (position < num_tokens)[:, None]


@triton.jit
def store_split(rows, partial, tile, split, num_tokens, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write this split's ``rows`` [BLOCK_M, COLUMNS] to ``partial`` [splits, N, COLUMNS]."""
    at, live = split_offsets(tile, num_tokens, COLUMNS, BLOCK_M)
    tl.store(partial + tl.cast(split, tl.int64) * num_tokens * COLUMNS + at, rows, mask=live)


@triton.jit
def comes_last(counters, tile, splits):
    """Whether this program is the last of its tile's splits to arrive here; the counter is back at zero then.

    It decides who sums, never the order of the sum: results are the same bit for bit in every run.
    """
    tl.debug_barrier()  # all threads' stores come before the one thread's release
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.atomic_xchg(counters + tile, 0)
    return last


@triton.jit
def sum_splits(
    partial, tile, splits, num_tokens, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, first=0, STEP: tl.constexpr = 1
):
    """The sum over ``partial`` [splits, N, COLUMNS] of a tile's rows, first split first: [BLOCK_M, COLUMNS].

    Of the splits from ``first`` on, each STEP-th.
    """
    at, live = split_offsets(tile, num_tokens, COLUMNS, BLOCK_M)
    rows = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    # Few tokens mean many splits: their loads wait for one another unless several are under way.
    AT_A_TIME: tl.constexpr = 16 if BLOCK_M * COLUMNS <= 1024 else 1
    for split in tl.range(first, splits, STEP, loop_unroll_factor=AT_A_TIME):
        # Past the L1 cache, which may hold what another multiprocessor has overwritten.
        start = partial + tl.cast(split, tl.int64) * num_tokens * COLUMNS
        rows += tl.load(start + at, mask=live, other=0.0, cache_modifier=".cg")
    return rows


@triton.jit
def reduce_splits(
    partial, counters, tile, split, splits, num_tokens, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Whether this program is the last of its tile, and then the sum over all splits' ``partial``: [BLOCK_M, COLUMNS].

    In two steps: the last of each `GROUP` of splits sums its own, the last of the groups their sums. One program would
    read 458 KB for 16 tokens of 224 splits. counters: one for the tile and one for each of its groups, tile by tile.
    """
    groups = tl.cdiv(splits, GROUP)
    group, own = split // GROUP, counters + tile * (groups + 1)
    end = tl.minimum((group + 1) * GROUP, splits)
    rows = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    last = comes_last(own + 1, group, end - group * GROUP)
    if last:
        rows = sum_splits(partial, tile, end, num_tokens, COLUMNS, BLOCK_M, group * GROUP)
        store_split(rows, partial, tile, group * GROUP, num_tokens, COLUMNS, BLOCK_M)
        last = comes_last(own, 0, groups)
        if last:
            rows = sum_splits(partial, tile, splits, num_tokens, COLUMNS, BLOCK_M, 0, GROUP)
    return last, rows


@triton.jit
def write_wide(
    rows, out, stride_out, ids, token, live, num_experts,
    SLOTS: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Write compact rows to n*r columns of ``out``: each slot's r values at its expert's columns, zero elsewhere."""
    whole = num_experts * RANK
    block: tl.constexpr = 64
    for c0 in range(0, whole, block):
        i = c0 + tl.arange(0, block)
        zero = tl.zeros([BLOCK_M, block], out.dtype.element_ty)
        tl.store(out + token[:, None] * stride_out + i[None, :], zero, mask=live[:, None] & (i < whole)[None, :])
    tl.debug_barrier()  # the zeros come before the values
    column = tl.arange(0, compact_columns(SLOTS, RANK))
    i = column % padded_rank(RANK)
    chosen = tl.full([BLOCK_M], -1, tl.int32)
    for slot in range(SLOTS):
        chosen = next_expert(ids, chosen, num_experts)
        own = (column // padded_rank(RANK) == slot) & (i < RANK)
        at = token[:, None] * stride_out + (chosen * RANK)[:, None] + i[None, :]
        inside = (live & (chosen < num_experts))[:, None] & own[None, :]
        tl.store(out + at, rows.to(out.dtype.element_ty), mask=inside)
