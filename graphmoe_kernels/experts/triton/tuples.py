"""Tokens put together by their tuple of experts, every tuple padded to whole tiles: a counting sort in two launches.

A tuple is a token's expert (one slot), or its two experts in rising order. Ids that are no tuple (none of the experts,
or one twice) have a tuple of their own, so that nothing of theirs is in another token's tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.tile import expert_weights, next_expert, row_experts

# Places of padding that are written at a time, for all tuples at once.
PADDED = tl.constexpr(16)


@triton.jit
def tuple_keys(expert_ids, token, live, num_experts, SLOTS: tl.constexpr, KEYS: tl.constexpr):
    """The number of every token's tuple: KEYS - 1 for ids that are none, KEYS where there is no token.

    Of two experts a < b it is b (b - 1) / 2 + a, which numbers pairs without a gap.
    """
    a = tl.load(expert_ids + token.to(tl.int64) * SLOTS, mask=live, other=0).to(tl.int32)
    real = (a >= 0) & (a < num_experts)
    key = a
    if SLOTS == 2:
        b = tl.load(expert_ids + token.to(tl.int64) * SLOTS + 1, mask=live, other=0).to(tl.int32)
        real &= (b >= 0) & (b < num_experts) & (a != b)
        larger = tl.where(real, tl.maximum(a, b), 0)
        key = larger * (larger - 1) // 2 + tl.minimum(a, b)
    return tl.where(live, tl.where(real, key, KEYS - 1), KEYS)


@triton.jit(do_not_specialize=["num_tokens"])
def experts_count_tuples(
    expert_ids, counts, num_tokens, num_experts, SLOTS: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """counts [blocks, KEYS] int32: how many of a block's BLOCK_M tokens have each tuple."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tuple_keys(expert_ids, token, token < num_tokens, num_experts, SLOTS, KEYS)
    k = tl.arange(0, KEYS)
    counted = tl.sum((key[:, None] == k[None, :]).to(tl.int32), axis=0)  # [KEYS]
    tl.store(counts + tl.program_id(0) * KEYS + k, counted)


@triton.jit
def sum_counts(counts, blocks, block, KEYS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Tokens of each tuple, [KEYS] int32 each: of all ``blocks``, and of those before ``block``."""
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
def place_slots(
    placed, expert_ids, routing_weights, token, place, live, num_experts, TILE: tl.constexpr, SLOTS: tl.constexpr
):
    """Write the tokens' weights at their places, by rising expert, and the experts of tiles that begin with one."""
    ids = row_experts(expert_ids, token.to(tl.int64), live, num_experts, SLOTS)
    smaller = next_expert(ids, tl.full([token.shape[0]], -1, tl.int32), num_experts)
    larger = smaller if SLOTS == 1 else next_expert(ids, smaller, num_experts)
    broken = live & (larger == num_experts)  # an id that is none, or one that stands twice: NaN, so that it shows
    w = expert_weights(routing_weights, ids, smaller, token.to(tl.int64), live, num_experts, SLOTS)
    begins = live & (place % TILE == 0)
    tl.store(placed.weights + place * SLOTS, tl.where(broken, float("nan"), w), mask=live)
    tl.store(placed.experts + place // TILE * SLOTS, tl.where(broken, num_experts, smaller), mask=begins)
    if SLOTS == 2:
        w = expert_weights(routing_weights, ids, larger, token.to(tl.int64), live, num_experts, SLOTS)
        tl.store(placed.weights + place * SLOTS + 1, w, mask=live)
        tl.store(placed.experts + place // TILE * SLOTS + 1, larger, mask=begins)


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def experts_place_tokens(
    expert_ids, routing_weights, counts, placed, num_tokens, num_positions, num_experts,
    SLOTS: tl.constexpr, KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, TILE: tl.constexpr,
):
    """Fill a `placing.Placed`: tokens by tuple, each tuple's followed by -1 up to whole tiles of ``TILE``.

    Programs 0..blocks-1 place their tokens, the one after them writes -1, and weights of 0, everywhere else. A tuple's
    tokens keep their order, so the result is the same in every run.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0) - 1
    k = tl.arange(0, KEYS)
    total, before = sum_counts(counts, blocks, block, KEYS, BLOCK_B)
    padded = (total + TILE - 1) // TILE * TILE
    start = tl.cumsum(padded, 0) - padded  # [KEYS], where a tuple's first tile begins
    if block < blocks:
        here = tl.arange(0, BLOCK_M)
        token = block * BLOCK_M + here
        live = token < num_tokens
        key = tuple_keys(expert_ids, token, live, num_experts, SLOTS, KEYS)
        earlier = (key[:, None] == key[None, :]) & (here[None, :] < here[:, None])
        place = tl.sum(earlier.to(tl.int32), axis=1)
        place += tl.sum(tl.where(key[:, None] == k[None, :], (start + before)[None, :], 0), axis=1)
        tl.store(placed.tokens + place, token, mask=live)
        end = tl.sum(tl.where(key[:, None] == k[None, :], (start + padded)[None, :], 0), axis=1)
        tl.store(placed.ends + place // TILE, end // TILE, mask=live & (place % TILE == 0))
        place_slots(placed, expert_ids, routing_weights, token, place, live, num_experts, TILE, SLOTS)
    else:
        for i in range(0, TILE, PADDED):
            at = (start + total + i)[:, None] + tl.arange(0, PADDED)[None, :]
            inside = at < (start + padded)[:, None]
            tl.store(placed.tokens + at, tl.full([KEYS, PADDED], -1, tl.int32), mask=inside)
            for slot in tl.static_range(SLOTS):
                tl.store(placed.weights + at * SLOTS + slot, tl.zeros([KEYS, PADDED], tl.float32), mask=inside)
        used = tl.sum(padded)
        tl.store(placed.used, used // TILE)
        for p0 in range(used, num_positions, BLOCK_M):
            p = p0 + tl.arange(0, BLOCK_M)
            tl.store(placed.tokens + p, tl.full([BLOCK_M], -1, tl.int32), mask=p < num_positions)
