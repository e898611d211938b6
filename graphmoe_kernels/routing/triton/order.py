"""The order of tokens in which neighbours share experts: a stable counting sort within windows of tokens."""

import triton
import triton.language as tl


@triton.jit
def sort_keys(expert_ids, tokens, end, window, TOP_K: tl.constexpr, WINDOW: tl.constexpr, MAX_EXPERTS: tl.constexpr):
    """The two smallest experts of each token, then its place in the window: no two keys of a window are equal."""
    smallest = tl.full(tokens.shape, MAX_EXPERTS, tl.int32)
    second = tl.full(tokens.shape, MAX_EXPERTS, tl.int32)
    for slot in tl.range(0, TOP_K):
        expert = tl.load(expert_ids + tokens.to(tl.int64) * TOP_K + slot, mask=tokens < end, other=0).to(tl.int32)
        second = tl.minimum(second, tl.maximum(smallest, expert))
        smallest = tl.minimum(smallest, expert)
    if TOP_K == 1:
        second = tl.zeros(tokens.shape, tl.int32)
    keys = (smallest * MAX_EXPERTS + second) * WINDOW + (tokens - window)
    return tl.where(tokens < end, keys, 2147483647)  # beyond the end: after every token


@triton.jit(do_not_specialize=["num_tokens"])
def routing_order(
    expert_ids,  # [N, k] integers
    order,  # [N] int32
    num_tokens,
    TOP_K: tl.constexpr,
    WINDOW: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens of a program; divides WINDOW
    BLOCK_J: tl.constexpr,  # tokens that they are compared with at a time
):
    """A token's position is the number of smaller keys in its window: no atomics, one possible result."""
    first = tl.program_id(0) * BLOCK_M
    window = first // WINDOW * WINDOW
    end = tl.minimum(window + WINDOW, num_tokens)
    tokens = first + tl.arange(0, BLOCK_M)
    keys = sort_keys(expert_ids, tokens, end, window, TOP_K, WINDOW, MAX_EXPERTS)[:, None]  # [BLOCK_M, 1]
    smaller = tl.zeros([BLOCK_M, BLOCK_J], tl.int32)
    for start in tl.range(window, end, BLOCK_J):
        others = start + tl.arange(0, BLOCK_J)
        smaller += (sort_keys(expert_ids, others, end, window, TOP_K, WINDOW, MAX_EXPERTS)[None, :] < keys).to(tl.int32)
    tl.store(order + window + tl.sum(smaller, axis=1), tokens, mask=tokens < end)
