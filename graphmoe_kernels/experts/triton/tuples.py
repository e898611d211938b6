"""Rows put together by their experts, those of each tuple padded to whole tiles: a counting sort in two launches.

A row's tuple is its expert, or its two experts in rising order (`sizes.Tiling`). Ids that are no tuple (none of the
experts, or one that a token has twice) have a tuple of their own, so that nothing of theirs is in another row's tile.
Where each slot is a launch of its own, the tuples of the second come after all of the first.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Places of padding that are written at a time, for all tuples at once.
PADDED = tl.constexpr(16)


@triton.jit
def row_experts(expert_ids, row, live, num_experts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    """Rows' first and last expert (one and the same where a row has one), and whether they are a tuple.

    Where a row is one slot of a token, its expert must be none of the other slots'.
    """
    own = expert_ids + row.to(tl.int64) * EXPERTS
    a = tl.load(own, mask=live, other=0).to(tl.int32)
    real = (a >= 0) & (a < num_experts)
    b = a
    if EXPERTS == 2:
        b = tl.load(own + 1, mask=live, other=0).to(tl.int32)
        real &= (b >= 0) & (b < num_experts) & (a != b)
    elif SLOTS > 1:
        for slot in tl.static_range(SLOTS):
            at = expert_ids + (row // SLOTS * SLOTS + slot).to(tl.int64)
            real &= (row % SLOTS == slot) | (tl.load(at, mask=live, other=-1).to(tl.int32) != a)
    return a, b, real


@triton.jit
def tuple_keys(a, b, real, row, EXPERTS: tl.constexpr, LAUNCHES: tl.constexpr, KEYS: tl.constexpr):
    """The number of every row's tuple: the last of its launch for ids that are none.

    Of two experts a < b it is b (b - 1) / 2 + a, which numbers pairs without a gap.
    """
    key = a
    if EXPERTS == 2:
        larger = tl.where(real, tl.maximum(a, b), 0)
        key = larger * (larger - 1) // 2 + tl.minimum(a, b)
    OWN: tl.constexpr = KEYS // LAUNCHES
    key = tl.where(real, key, OWN - 1)
    if LAUNCHES > 1:
        key += row % LAUNCHES * OWN
    return key


@triton.jit(do_not_specialize=["num_rows", "chunks"])
def experts_count_tuples(
    expert_ids, counts, num_rows, chunks, num_experts,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, LAUNCHES: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """counts [blocks, KEYS] int32: how many of a block's rows, ``chunks`` times BLOCK_M of them, have each tuple."""
    counted = tl.zeros([KEYS], tl.int32)
    for chunk in range(chunks):
        row = (tl.program_id(0) * chunks + chunk) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = row < num_rows
        a, b, real = row_experts(expert_ids, row, live, num_experts, SLOTS, EXPERTS)
        counted += tl.histogram(tuple_keys(a, b, real, row, EXPERTS, LAUNCHES, KEYS), KEYS, mask=live)
    tl.store(counts + tl.program_id(0) * KEYS + tl.arange(0, KEYS), counted)


@triton.jit
def sum_counts(counts, blocks, block, KEYS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Rows of each tuple, [KEYS] int32 each: of all ``blocks``, and of those before ``block``."""
    k = tl.arange(0, KEYS)
    total = tl.zeros([KEYS], tl.int32)
    before = tl.zeros([KEYS], tl.int32)
    for b0 in range(0, blocks, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        counted = tl.load(counts + b[:, None] * KEYS + k[None, :], mask=(b < blocks)[:, None], other=0)
        total += tl.sum(counted, axis=0)
        before += tl.sum(tl.where((b < block)[:, None], counted, 0), axis=0)
    return total, before


@triton.jit
def place_rows(
    placed, routing_weights, row, place, end, experts, live, num_experts, EXPERTS: tl.constexpr, TILE: tl.constexpr
):
    """Write rows and their weights at their places, and the experts and ends of tiles that begin with one of them.

    Weights of ids that are no tuple are NaN, so that it shows.
    """
    a, b, real = experts
    tl.store(placed.rows + place, row, mask=live)
    tl.store(placed.places + row, place, mask=live)
    begins = live & (place % TILE == 0)
    tl.store(placed.ends + place // TILE, end // TILE, mask=begins)
    of_tile = placed.experts + place // TILE * EXPERTS
    tl.store(of_tile, tl.where(real, tl.minimum(a, b), num_experts), mask=begins)
    own = routing_weights + row.to(tl.int64) * EXPERTS
    w = tl.load(own, mask=live, other=0.0).to(tl.float32)
    if EXPERTS == 2:
        tl.store(of_tile + 1, tl.where(real, tl.maximum(a, b), num_experts), mask=begins)
        other = tl.load(own + 1, mask=live, other=0.0).to(tl.float32)
        larger = tl.where(a < b, other, w)
        tl.store(placed.weights + place * 2 + 1, tl.where(real, larger, float("nan")), mask=live)
        w = tl.where(a < b, w, other)
    tl.store(placed.weights + place * EXPERTS, tl.where(real, w, float("nan")), mask=live)


@triton.jit
def pad_tiles(
    placed, first, padded, num_positions,
    EXPERTS: tl.constexpr, LAUNCHES: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """Write the launches' ends, -1 and weights of 0 from every tuple's ``first`` free place [KEYS] on, and -1 behind
    the last tile.
    """
    end = tl.cumsum(padded, 0)
    for i in range(0, TILE, PADDED):
        at = (first + i)[:, None] + tl.arange(0, PADDED)[None, :]
        inside = at < end[:, None]
        tl.store(placed.rows + at, tl.full(at.shape, -1, tl.int32), mask=inside)
        for expert in tl.static_range(EXPERTS):
            tl.store(placed.weights + at * EXPERTS + expert, tl.zeros(at.shape, tl.float32), mask=inside)
    used = tl.sum(padded)
    key = tl.arange(0, KEYS) + 1
    OWN: tl.constexpr = KEYS // LAUNCHES
    tl.store(placed.used + key // OWN - 1, end // TILE, mask=key % OWN == 0)
    for p0 in range(used, num_positions, BLOCK_M):
        p = p0 + tl.arange(0, BLOCK_M)
        tl.store(placed.rows + p, tl.full([BLOCK_M], -1, tl.int32), mask=p < num_positions)


@triton.jit(do_not_specialize=["num_rows", "chunks", "num_positions"])
def experts_place_rows(
    expert_ids, routing_weights, counts, placed, num_rows, chunks, num_positions, num_experts,
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, LAUNCHES: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, TILE: tl.constexpr,
):
    """Fill a `placing.Placed`: rows by tuple, each tuple's followed by -1 up to whole tiles of ``TILE``.

    Programs 0..blocks-1 place their rows, the one after them pads. A tuple's rows keep their order, so the result is
    the same in every run.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0) - 1
    total, before = sum_counts(counts, blocks, block, KEYS, BLOCK_B)
    padded = (total + TILE - 1) // TILE * TILE
    end = tl.cumsum(padded, 0)  # [KEYS], the place after a tuple's last tile
    if block == blocks:
        pad_tiles(placed, end - padded + total, padded, num_positions, EXPERTS, LAUNCHES, KEYS, TILE, BLOCK_M)
    else:
        following = end - padded + before  # [KEYS], the place of the next row of each tuple
        here = tl.arange(0, BLOCK_M)
        for chunk in range(chunks):
            row = (block * chunks + chunk) * BLOCK_M + here
            live = row < num_rows
            a, b, real = row_experts(expert_ids, row, live, num_experts, SLOTS, EXPERTS)
            key = tuple_keys(a, b, real, row, EXPERTS, LAUNCHES, KEYS)
            earlier = (key[:, None] == key[None, :]) & (here[None, :] < here[:, None])
            place = tl.gather(following, key, 0) + tl.sum(earlier.to(tl.int32), axis=1)
            place_rows(
                placed, routing_weights, row, place, tl.gather(end, key, 0), (a, b, real), live, num_experts, EXPERTS,
                TILE,
            )
            following += tl.histogram(key, KEYS, mask=live)
