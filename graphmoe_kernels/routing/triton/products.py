"""The gradients of x and of the router from that of the logits, in one launch that reads x once."""

import triton
import triton.language as tl

from graphmoe_kernels.routing.triton.exact import dot_of_parts, parts


@triton.jit(do_not_specialize=["num_tokens", "tiles"])
def routing_backward_products(
    total,  # [N, n] fp32, contiguous: the whole gradient of the logits
    x,  # [N, D], or None: then d_router is None too
    router,  # [n, D], contiguous, or None: then d_x is None too
    d_x,  # [N, D], contiguous
    d_router,  # [splits, n, D], contiguous: what each split of the tokens adds
    num_tokens,
    hidden,
    stride_x,
    tiles,  # of tokens, per split
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,  # n rounded up to a power of two, 16 at least
):
    """d_x = total R and d_router = total^T x of BLOCK_D columns and a split's tokens, BLOCK_M at a time."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    experts = tl.arange(0, BLOCK_E)
    places = experts.to(tl.int64)[:, None] * hidden + columns[None, :]  # [BLOCK_E, BLOCK_D]
    real = (experts < NUM_EXPERTS)[:, None] & (columns < hidden)[None, :]
    if router is not None:
        router_parts = parts(tl.load(router + places, mask=real, other=0.0))
    summed = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for tile in tl.range(0, tiles):
        tokens = (tl.program_id(1) * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = tokens.to(tl.int64)[:, None]
        live = (tokens < num_tokens)[:, None]
        here = live & (experts < NUM_EXPERTS)[None, :]
        gradient = parts(tl.load(total + rows * NUM_EXPERTS + experts[None, :], mask=here, other=0.0))
        inside = live & (columns < hidden)[None, :]
        if x is not None:
            read = tl.load(x + rows * stride_x + columns[None, :], mask=inside, other=0.0)
            # Matrix units round every sum that they add up down, so each block of tokens gets a sum of its own.
            summed += dot_of_parts(parts(tl.trans(read)), gradient)
        if router is not None:
            found = dot_of_parts(gradient, router_parts)
            tl.store(d_x + rows * hidden + columns[None, :], found.to(d_x.dtype.element_ty), mask=inside)
    if x is not None:
        split = tl.program_id(1).to(tl.int64) * NUM_EXPERTS * hidden
        tl.store(d_router + split + places, tl.trans(summed).to(d_router.dtype.element_ty), mask=real)
