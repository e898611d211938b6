"""Sums over the splits of F in a fixed order, by the program of a tile that comes last (`counters` counts them)."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.sizes import SUMMED_AT_ONCE
from graphmoe_kernels.experts.triton.tile import padded_rank

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
        tl.store(counters + tile, 0)  # the next to read it is another launch's
    return last


@triton.jit
def sum_splits(
    partial, tile, splits, num_tokens, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, first=0, STEP: tl.constexpr = 1
):
    """The sum over ``partial`` [splits, N, COLUMNS] of a tile's rows, always in one order: [BLOCK_M, COLUMNS].

    Of the splits from ``first`` on, each STEP-th.
    """
    at, live = split_offsets(tile, num_tokens, COLUMNS, BLOCK_M)
    # Few tokens mean many splits: their loads wait for one another unless many are under way.
    AT_A_TIME: tl.constexpr = min(GROUP, max(1, 4096 // (BLOCK_M * COLUMNS)))
    rows = tl.zeros([AT_A_TIME, BLOCK_M, COLUMNS], tl.float32)
    for start in range(first, splits, AT_A_TIME * STEP):
        split = start + tl.arange(0, AT_A_TIME) * STEP
        there = (split < splits)[:, None, None] & live[None, :, :]
        split_at = split.to(tl.int64)[:, None, None] * num_tokens * COLUMNS + at[None, :, :]
        # Past the L1 cache, which may hold what another multiprocessor has overwritten.
        rows += tl.load(partial + split_at, mask=there, other=0.0, cache_modifier=".cg")
    return tl.sum(rows, axis=0)


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
def clear_wide(out, stride_out, token, live, block, blocks, columns, BLOCK_M: tl.constexpr):
    """Write zeros to this program's share of a tile's rows of ``out``; values come after `reduce_splits`."""
    own: tl.constexpr = 64
    for c0 in range(block * own, columns, blocks * own):
        c = c0 + tl.arange(0, own)
        at = out + token[:, None] * stride_out + c[None, :]
        tl.store(at, tl.zeros([BLOCK_M, own], out.dtype.element_ty), mask=live[:, None] & (c < columns)[None, :])


@triton.jit
def write_slots(
    rows, out, stride_out, token, experts, num_experts, RANK: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write compact rows [BLOCK_M, COLUMNS]: each slot's r values at its expert's columns of ``out`` [N, n*r].

    experts [slots * BLOCK_M], a slot's tokens side by side: num_experts where there is none.
    """
    padded: tl.constexpr = padded_rank(RANK)
    slots: tl.constexpr = rows.shape[1] // padded
    values = tl.permute(tl.reshape(rows, [BLOCK_M, slots, padded]), [1, 0, 2])
    values = tl.reshape(values, [slots * BLOCK_M, padded]).to(out.dtype.element_ty)
    i = tl.arange(0, padded)
    at = tl.reshape(tl.broadcast_to(token[None, :], [slots, BLOCK_M]), [slots * BLOCK_M]) * stride_out + experts * RANK
    tl.store(out + at[:, None] + i[None, :], values, mask=(experts < num_experts)[:, None] & (i < RANK)[None, :])
