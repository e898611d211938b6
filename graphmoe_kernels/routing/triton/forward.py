"""Top-k softmax routing in one launch: the router's product, the softmax and the choice; and of given logits."""

import triton
import triton.language as tl

from graphmoe_kernels.routing.triton.primitives import store_routing


@triton.jit
def exact_dot(x, router):
    """x router, accurate as in fp32, whatever the two dtypes are."""
    if x.dtype == router.dtype:  # two fp16 or bf16 numbers have an exact product in fp32
        acc = tl.dot(x, router, input_precision="ieee")
    elif x.dtype == tl.float32:
        acc = tl.dot(x, router.to(tl.float32), input_precision="ieee")
    else:
        # Three bf16 numbers hold the 24 bits of an fp32 one, and two those of an fp16 one: so all products are exact,
        # on matrix units that do not multiply fp32.
        wide = router.to(tl.float32)
        high = wide.to(tl.bfloat16)
        rest = wide - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        x_high = x.to(tl.float32).to(tl.bfloat16)
        acc = tl.dot(x_high, low)
        if x.dtype == tl.float16:
            x_low = (x.to(tl.float32) - x_high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(x_low, low, acc)
            acc = tl.dot(x_low, middle, acc)
            acc = tl.dot(x_low, high, acc)
        acc = tl.dot(x_high, middle, acc)
        acc = tl.dot(x_high, high, acc)
    return acc


@triton.jit
def project(
    x,
    router,
    tokens,
    experts,
    num_tokens,
    hidden,
    stride_x,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x R^T of a block of tokens, [BLOCK_M, BLOCK_E] fp32.

    Matrix units round every sum that they add up down, so each block of columns gets a sum of its own. A token on its
    own is no work for them: its products are added up lane by lane, and nothing waits for the product before.
    """
    x_rows = x + tokens.to(tl.int64)[:, None] * stride_x  # [BLOCK_M, 1]
    router_rows = router + experts.to(tl.int64)[:, None] * hidden  # [BLOCK_E, 1]
    lanes = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for start in tl.range(0, hidden, BLOCK_D):
        columns = (start + tl.arange(0, BLOCK_D))[None, :]
        inside = columns < hidden
        x_tile = tl.load(x_rows + columns, mask=(tokens < num_tokens)[:, None] & inside, other=0.0)
        router_tile = tl.load(router_rows + columns, mask=(experts < NUM_EXPERTS)[:, None] & inside, other=0.0)
        if BLOCK_M == 1:
            lanes += x_tile.to(tl.float32) * router_tile.to(tl.float32)
        else:
            acc += exact_dot(x_tile, tl.trans(router_tile))
    if BLOCK_M == 1:
        acc += tl.sum(lanes, axis=1)[None, :]
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def routing_forward(
    x,  # [N, D]
    router,  # [n, D], contiguous
    offset,  # [N, n], contiguous, or None
    logits,  # [N, n] fp32
    routing_weights,  # [N, k] fp32
    expert_ids,  # [N, k] int32
    num_tokens,
    hidden,
    stride_x,
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,  # k rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,  # n rounded up to a power of two, and where BLOCK_M is not 1 to 16 at least
):
    """Everything that routing knows of BLOCK_M tokens, from their states."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_E)
    places = tokens.to(tl.int64)[:, None] * NUM_EXPERTS + lanes[None, :]
    inside = (tokens < num_tokens)[:, None] & (lanes < NUM_EXPERTS)[None, :]
    found = project(x, router, tokens, lanes, num_tokens, hidden, stride_x, NUM_EXPERTS, BLOCK_M, BLOCK_E, BLOCK_D)
    if offset is not None:
        found += tl.load(offset + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(logits + places, found, mask=inside)
    store_routing(
        routing_weights, expert_ids, found, tokens, num_tokens, NORMALIZE, NUM_EXPERTS, TOP_K, TOP_K_PADDED, BLOCK_E
    )


@triton.jit(do_not_specialize=["num_tokens"])
def routing_topk(
    logits,  # [N, n] fp32, contiguous
    routing_weights,  # [N, k] fp32
    expert_ids,  # [N, k] int32
    num_tokens,
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The routing of BLOCK_M tokens by logits that are there."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_E)[None, :]
    inside = (tokens < num_tokens)[:, None] & (lanes < NUM_EXPERTS)
    given = tl.load(logits + tokens.to(tl.int64)[:, None] * NUM_EXPERTS + lanes, mask=inside, other=0.0)
    store_routing(
        routing_weights, expert_ids, given, tokens, num_tokens, NORMALIZE, NUM_EXPERTS, TOP_K, TOP_K_PADDED, BLOCK_E
    )
