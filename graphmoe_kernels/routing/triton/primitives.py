"""What the routing kernels share: the softmax over experts and the choice of the largest."""

import triton
import triton.language as tl


@triton.jit
def softmax(logits, real):
    """Softmax over the lanes of ``real`` experts; a row with NaN, +inf or nothing but -inf is NaN throughout."""
    shifted = logits - tl.max(tl.where(real, logits, -float("inf")), axis=1)[:, None]
    exponentials = tl.where(real, tl.exp(shifted), 0.0)
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@triton.jit
def choose(logits, probabilities, experts, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr):
    """The TOP_K largest logits of each row, the lower index first among equals.

    Gives the chosen probabilities and experts, [BLOCK_M, TOP_K_PADDED] each. ``experts`` is -1 in lanes beyond the
    real experts: they are no candidates.
    """
    slots = tl.arange(0, TOP_K_PADDED)[None, :]
    # NaN compares with nothing: as -inf it is chosen last, and the experts stay distinct whatever a row holds.
    scores = tl.where(logits == logits, logits, -float("inf"))
    taken = tl.zeros(logits.shape, tl.int32)
    values = tl.zeros([logits.shape[0], TOP_K_PADDED], tl.float32)
    chosen = tl.zeros([logits.shape[0], TOP_K_PADDED], tl.int32)
    for slot in tl.range(0, TOP_K):
        free = (experts >= 0) & (taken == 0)
        best = tl.max(tl.where(free, scores, -float("inf")), axis=1)[:, None]
        index = tl.min(tl.where(free & (scores == best), experts, logits.shape[1]), axis=1)[:, None]
        taken = tl.where(experts == index, 1, taken)
        value = tl.sum(tl.where(experts == index, probabilities, 0.0), axis=1)[:, None]
        values = tl.where(slots == slot, value, values)
        chosen = tl.where(slots == slot, index, chosen)
    return values, chosen


@triton.jit
def store_routing(
    routing_weights,
    expert_ids,
    logits,
    tokens,
    num_tokens,
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Route ``tokens`` [BLOCK_M] by their logits [BLOCK_M, BLOCK_E], and store weights and experts."""
    lanes = tl.arange(0, BLOCK_E)[None, :]
    real = lanes < NUM_EXPERTS
    values, chosen = choose(logits, softmax(logits, real), tl.where(real, lanes, -1), TOP_K, TOP_K_PADDED)
    if NORMALIZE:
        values /= tl.sum(values, axis=1)[:, None]
    slots = tl.arange(0, TOP_K_PADDED)[None, :]
    places = tokens.to(tl.int64)[:, None] * TOP_K + slots
    inside = (tokens < num_tokens)[:, None] & (slots < TOP_K)
    tl.store(routing_weights + places, values, mask=inside)
    tl.store(expert_ids + places, chosen, mask=inside)
