"""How the kernels of routing's backward are launched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import per_device
from graphmoe_kernels.experts.triton.sizes import cut, program_slots
from graphmoe_kernels.launching import kernel_config, launch, multiprocessors, with_row_stride
from graphmoe_kernels.routing.triton.launch import blocks, class_tokens

# Up to so many experts the kernels multiply with router and x. With more, what a program holds of all experts spills,
# or its blocks are so small that the router and the logits' gradient are read hundreds of times: compiled so for 256
# experts, they were predicted to take 4 times the products of cuBLAS, casts of x and of its gradient included.
PRODUCT_EXPERTS = 64
# Elements of a block of `routing_backward` where it multiplies. Its eight warps hold no sums from pass to pass, so that
# twice the other kernels' fit; with half, each program would split the same router for half as many tokens.
TOKEN_ELEMENTS = 4096
# Up to so many tiles of tokens one program sums up: the launch that adds up splits takes as long as four tiles.
UNSPLIT_TILES = 4


class Kind(NamedTuple):
    """A kernel, what is the same in all its launches of a kind, and how many of its programs run at once."""

    kernel: Any
    constants: dict[str, Any]
    slots: int


def backward(
    d_routing_weights: Tensor | None,
    d_logits: Tensor | None,
    logits: Tensor,
    expert_ids: Tensor,
    x: Tensor | None,
    router: Tensor | None,
    normalize: bool,
    dtype: torch.dtype,
    wants_total: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the logits [N, n] in fp32, of x [N, D] in ``dtype`` and of the router [n, D] in fp32.

    One launch for the first two; another for the third, with a sum over its splits of the tokens if it has several.

    Args:
        d_routing_weights, d_logits: [N, k] and [N, n] fp32; one of them may be None.
        logits, expert_ids: what `route` gave: [N, n] and [N, k].
        x: [N, D], or None where the router needs no gradient; router: [n, D], or None where x needs none. Both are for
            `PRODUCT_EXPERTS` experts at most.
        normalize: as in `route`.
        dtype: of x.
        wants_total: whether the logits' own gradient is asked for. It is also given where the router's needs it.
    """
    wants_total = wants_total or x is not None
    total, d_x = _of_tokens(d_routing_weights, d_logits, logits, expert_ids, router, normalize, dtype, wants_total)
    return total, d_x, None if x is None or total is None else _of_router(total, x)


def _of_tokens(
    d_routing_weights: Tensor | None,
    d_logits: Tensor | None,
    logits: Tensor,
    expert_ids: Tensor,
    router: Tensor | None,
    normalize: bool,
    dtype: torch.dtype,
    wants_total: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the logits [N, n], where it is wanted, and that of x [N, D], where there is a ``router``."""
    (num_tokens, num_experts), top_k, device = logits.shape, expert_ids.shape[1], logits.device
    kernel, constants, slots = _tokens_kind(class_tokens(num_tokens), dtype, device, num_experts, top_k, normalize)
    tiles, hidden, programs, columns = -(-num_tokens // constants["BLOCK_M"]), 0, 1, 0
    total = d_x = None
    if d_routing_weights is not None and wants_total:  # else what arrives at the logits is their whole gradient
        total = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
    if router is not None:
        hidden = router.shape[1]
        d_x = torch.empty(num_tokens, hidden, dtype=dtype, device=device)
        programs, columns = cut(-(-hidden // constants["BLOCK_D"]), max(tiles, 1), slots)
    if total is not None or d_x is not None:
        launch(
            kernel,
            (tiles, programs),
            None if d_routing_weights is None else d_routing_weights.contiguous(),
            None if d_logits is None else d_logits.contiguous(),
            logits.contiguous(),
            expert_ids,
            None if router is None else router.contiguous(),
            total,
            d_x,
            num_tokens,
            hidden,
            columns,
            device=device,
            **constants,
        )
    return d_logits if d_routing_weights is None else total, d_x


def _of_router(total: Tensor, x: Tensor) -> Tensor:
    """total^T x [n, D] in fp32, of the logits' gradient [N, n] in fp32 and x [N, D]; splits summed in a fixed order."""
    (num_tokens, num_experts), hidden, device = total.shape, x.shape[1], x.device
    kernel, constants, slots = _router_kind(class_tokens(num_tokens), x.dtype, device, num_experts)
    stripes = -(-hidden // constants["BLOCK_D"])
    splits, tiles = 1, -(-num_tokens // constants["BLOCK_M"])
    if tiles > UNSPLIT_TILES:
        splits, tiles = cut(tiles, max(stripes, 1), slots)
    x, stride_x = with_row_stride(x)
    d_router = torch.empty(splits, num_experts, hidden, dtype=torch.float32, device=device)
    launch(
        kernel,
        (stripes, splits),
        total.contiguous(),
        x,
        d_router,
        num_tokens,
        hidden,
        stride_x,
        tiles,
        device=device,
        **constants,
    )
    return d_router[0] if splits == 1 else d_router.sum(dim=0)


@per_device
def _tokens_kind(
    num_tokens: int, dtype: torch.dtype, device: torch.device, num_experts: int, top_k: int, normalize: bool
) -> Kind:
    from graphmoe_kernels.routing.triton.backward import routing_backward

    config = kernel_config("routing_backward", num_tokens, dtype, device)
    multiplies = num_experts <= PRODUCT_EXPERTS
    config = blocks(config, num_experts, TOKEN_ELEMENTS) if multiplies else blocks(config, num_experts)
    constants = {"NORMALIZE": normalize, "NUM_EXPERTS": num_experts, "TOP_K": top_k} | config
    return Kind(routing_backward, constants, program_slots(config, multiprocessors(device)))


@per_device
def _router_kind(num_tokens: int, dtype: torch.dtype, device: torch.device, num_experts: int) -> Kind:
    from graphmoe_kernels.routing.triton.backward import routing_backward_router

    config = blocks(kernel_config("routing_backward_router", num_tokens, dtype, device), num_experts)
    constants = {"NUM_EXPERTS": num_experts} | config
    return Kind(routing_backward_router, constants, program_slots(config, multiprocessors(device)))
