"""The gradient of routing: of the logits and from it that of x in one launch, that of the router in another."""

import triton
import triton.language as tl

from graphmoe_kernels.routing.triton.exact import dot_of_parts, parts
from graphmoe_kernels.routing.triton.primitives import softmax


@triton.jit
def through_weights(
    d_routing_weights,
    probabilities,
    expert_ids,
    tokens,
    num_tokens,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradient of the logits of ``tokens`` [BLOCK_M] by their routing weights: [BLOCK_M, BLOCK_E]."""
    lanes = tl.arange(0, BLOCK_E)[None, :]
    slots = tokens.to(tl.int64) * TOP_K
    d_chosen = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)  # the weights' gradient at the experts that they belong to
    chosen = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)  # their probabilities there
    for slot in tl.range(0, TOP_K):
        expert = tl.load(expert_ids + slots + slot, mask=tokens < num_tokens, other=BLOCK_E)[:, None]
        upstream = tl.load(d_routing_weights + slots + slot, mask=tokens < num_tokens, other=0.0)[:, None]
        d_chosen = tl.where(lanes == expert, upstream, d_chosen)
        chosen = tl.where(lanes == expert, probabilities, chosen)

    if NORMALIZE:  # renormalised weights are the softmax over the chosen experts alone
        weights = chosen / tl.sum(tl.where((tokens < num_tokens)[:, None], chosen, 1.0), axis=1)[:, None]
    else:
        weights = probabilities
    return weights * (d_chosen - tl.sum(d_chosen * weights, axis=1)[:, None])


@triton.jit(do_not_specialize=["num_tokens", "blocks"])
def routing_backward(
    d_routing_weights,  # [N, k] fp32, or None
    d_logits,  # [N, n] fp32, or None: what arrives at the logits directly
    logits,  # [N, n] fp32
    expert_ids,  # [N, k] int32
    router,  # [n, D], contiguous, or None: then there is no d_x either
    total,  # [N, n] fp32: the whole gradient of the logits; or None
    d_x,  # [N, D], contiguous
    num_tokens,
    hidden,
    blocks,  # of BLOCK_D columns, per program
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,  # n rounded up to a power of two, 16 at least
):
    """The whole gradient of BLOCK_M tokens' logits, through the weights and what arrives directly; and its product with
    some of the router's columns, which is x's.

    Programs of the same tokens compute the first again: with few tokens they share the columns.
    """
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.arange(0, BLOCK_E)
    rows = tokens.to(tl.int64)[:, None]
    places = rows * NUM_EXPERTS + experts[None, :]
    inside = (tokens < num_tokens)[:, None] & (experts < NUM_EXPERTS)[None, :]
    found = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    if d_routing_weights is not None:
        given = tl.load(logits + places, mask=inside, other=0.0)
        probabilities = softmax(given, (experts < NUM_EXPERTS)[None, :])
        found += through_weights(
            d_routing_weights, probabilities, expert_ids, tokens, num_tokens, NORMALIZE, TOP_K, BLOCK_M, BLOCK_E
        )
    if d_logits is not None:
        found += tl.load(d_logits + places, mask=inside, other=0.0)
    if total is not None:
        tl.store(total + places, found, mask=inside & (tl.program_id(1) == 0))
    if router is not None:
        gradient = parts(found)
        router_rows = router + experts.to(tl.int64)[:, None] * hidden
        for block in tl.range(0, blocks):
            columns = ((tl.program_id(1) * blocks + block) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            real = (experts < NUM_EXPERTS)[:, None] & (columns < hidden)
            product = dot_of_parts(gradient, parts(tl.load(router_rows + columns, mask=real, other=0.0)))
            live = (tokens < num_tokens)[:, None] & (columns < hidden)
            tl.store(d_x + rows * hidden + columns, product.to(d_x.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_tokens", "tiles"])
def routing_backward_router(
    total,  # [N, n] fp32, contiguous: the whole gradient of the logits
    x,  # [N, D]
    d_router,  # [splits, n, D], contiguous: what each split of the tokens adds
    num_tokens,
    hidden,
    stride_x,
    tiles,  # of tokens, per split
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """total^T x of BLOCK_D columns and a split's tokens, BLOCK_M at a time."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    experts = tl.arange(0, BLOCK_E)
    summed = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for tile in tl.range(0, tiles):
        tokens = (tl.program_id(1) * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = tokens.to(tl.int64)[:, None]
        live = (tokens < num_tokens)[:, None]
        inside = live & (experts < NUM_EXPERTS)[None, :]
        gradient = tl.load(total + rows * NUM_EXPERTS + experts[None, :], mask=inside, other=0.0)
        read = tl.load(x + rows * stride_x + columns[None, :], mask=live & (columns < hidden)[None, :], other=0.0)
        # Matrix units round every sum that they add up down, so each block of tokens gets a sum of its own.
        summed += dot_of_parts(parts(tl.trans(read)), parts(gradient))
    places = (tl.program_id(1).to(tl.int64) * NUM_EXPERTS + experts[:, None]) * hidden + columns[None, :]
    real = (experts < NUM_EXPERTS)[:, None] & (columns < hidden)[None, :]
    tl.store(d_router + places, tl.trans(summed), mask=real)
