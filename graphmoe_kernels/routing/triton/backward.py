"""The gradient of routing in the logits, in one launch."""

import triton
import triton.language as tl

from graphmoe_kernels.routing.triton.primitives import softmax


@triton.jit(do_not_specialize=["num_tokens"])
def routing_backward(
    d_routing_weights,  # [N, k] fp32
    d_logits,  # [N, n] fp32, or None: what arrives at the logits directly
    logits,  # [N, n] fp32
    expert_ids,  # [N, k] int32
    total,  # [N, n] fp32
    num_tokens,
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # n rounded up to a power of two, 16 at least
):
    """The whole gradient of BLOCK_M tokens' logits: through the weights, and what arrives directly."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_E)[None, :]
    rows = tokens.to(tl.int64)
    places = rows[:, None] * NUM_EXPERTS + lanes
    inside = (tokens < num_tokens)[:, None] & (lanes < NUM_EXPERTS)
    probabilities = softmax(tl.load(logits + places, mask=inside, other=0.0), lanes < NUM_EXPERTS)

    d_chosen = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)  # the weights' gradient at the experts that they belong to
    chosen = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)  # their probabilities there
    for slot in tl.range(0, TOP_K):
        expert = tl.load(expert_ids + rows * TOP_K + slot, mask=tokens < num_tokens, other=BLOCK_E)[:, None]
        upstream = tl.load(d_routing_weights + rows * TOP_K + slot, mask=tokens < num_tokens, other=0.0)[:, None]
        d_chosen = tl.where(lanes == expert, upstream, d_chosen)
        chosen = tl.where(lanes == expert, probabilities, chosen)

    if NORMALIZE:  # renormalised weights are the softmax over the chosen experts alone
        weights = chosen / tl.sum(tl.where((tokens < num_tokens)[:, None], chosen, 1.0), axis=1)[:, None]
    else:
        weights = probabilities
    found = weights * (d_chosen - tl.sum(d_chosen * weights, axis=1)[:, None])
    if d_logits is not None:
        found += tl.load(d_logits + places, mask=inside, other=0.0)
    tl.store(total + places, found, mask=inside)
