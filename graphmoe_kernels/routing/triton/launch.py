"""How the routing kernels are launched: outputs, block sizes, precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.backend import per_device
from graphmoe_kernels.experts.triton.sizes import cut, program_slots
from graphmoe_kernels.launching import (
    SKINNY_TOKENS,
    Config,
    kernel_config,
    launch,
    multiprocessors,
    power_of_two,
    with_row_stride,
)

MAX_EXPERTS = 256  # a row's experts are handled in registers, all at once
# What `routing_backward_products` holds of experts by tokens, and of experts by columns.
PRODUCT_ELEMENTS = 4096
# A kernel, and everything that is the same in all its launches of a kind: constants, blocks, warps and stages.
Kind = tuple[Any, dict[str, Any]]


def blocks(config: Config, num_experts: int, elements: int = 2048) -> Config:
    """A kernel's configuration with BLOCK_E, which holds all experts.

    Beside it a block over tokens or columns has no more than ``elements``, but 16 rows, as matrix instructions take; so
    with more than 128 experts eight warps share what four cannot hold. A program of one token multiplies without them,
    and has a block over columns of 16,384 elements.
    """
    alone = config["BLOCK_M"] == 1
    block_experts = max(1 if alone else 16, power_of_two(num_experts))
    largest = max(1 if alone else 16, (16384 if alone else elements) // block_experts)
    bounded = {name: min(size, largest) for name, size in config.items() if name.startswith("BLOCK_")}
    warps = max(config["num_warps"], 8) if block_experts > 128 else config["num_warps"]
    return {**config, **bounded, "BLOCK_E": block_experts, "num_warps": warps}


def kind(name: str, num_tokens: int, dtype: torch.dtype, device: torch.device, *sizes: Any) -> Kind:
    """The kernel called ``name`` and the constants of its launches; ``sizes`` are n, k and whether to normalise."""
    return _kind(name, 1 if num_tokens <= SKINNY_TOKENS else SKINNY_TOKENS + 1, dtype, device, *sizes)


@per_device
def _kind(
    name: str, num_tokens: int, dtype: torch.dtype, device: torch.device, num_experts: int, top_k: int, normalize: bool
) -> Kind:
    from graphmoe_kernels.routing.triton import backward, forward

    constants = {"NORMALIZE": normalize, "NUM_EXPERTS": num_experts, "TOP_K": top_k}
    if name != "routing_backward":
        constants["TOP_K_PADDED"] = power_of_two(top_k)
    kernel = getattr(backward if name == "routing_backward" else forward, name)
    return kernel, constants | blocks(kernel_config(name, num_tokens, dtype, device), num_experts)


def route(
    x: Tensor, router: Tensor, offset: Tensor | None, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [N, n], routing weights [N, k] and expert ids [N, k] of ``offset + x router^T``, in one launch."""
    num_tokens, hidden = x.shape
    num_experts, device = router.shape[0], x.device
    logits, routing_weights, expert_ids = allocate(x, num_experts, top_k)
    kernel, constants = kind("routing_forward", num_tokens, x.dtype, device, num_experts, top_k, normalize)
    x, stride_x = with_row_stride(x)
    launch(
        kernel,
        (-(-num_tokens // constants["BLOCK_M"]),),
        x,
        router.contiguous(),
        None if offset is None else offset.contiguous(),
        logits,
        routing_weights,
        expert_ids,
        num_tokens,
        hidden,
        stride_x,
        device=device,
        **constants,
    )
    return logits, routing_weights, expert_ids


def allocate(x: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised outputs of `route` for the tokens of x."""
    num_tokens = x.shape[0]
    return (
        x.new_empty((num_tokens, num_experts), dtype=torch.float32),
        x.new_empty((num_tokens, top_k), dtype=torch.float32),
        x.new_empty((num_tokens, top_k), dtype=torch.int32),
    )


def topk_softmax(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return routing weights [N, k] and expert ids [N, k] of fp32 ``logits`` [N, n], in one launch."""
    num_tokens, num_experts = logits.shape
    _, routing_weights, expert_ids = allocate(logits, 0, top_k)
    kernel, constants = kind("routing_topk", num_tokens, logits.dtype, logits.device, num_experts, top_k, normalize)
    launch(
        kernel,
        (-(-num_tokens // constants["BLOCK_M"]),),
        logits.contiguous(),
        routing_weights,
        expert_ids,
        num_tokens,
        device=logits.device,
        **constants,
    )
    return routing_weights, expert_ids


@per_device
def _products_kind(num_tokens: int, dtype: torch.dtype, device: torch.device, num_experts: int) -> tuple[Kind, int]:
    """The kernel of the products, the constants of its launches, and how many of its programs run at once."""
    from graphmoe_kernels.routing.triton.products import routing_backward_products

    config = kernel_config("routing_backward_products", num_tokens, dtype, device)
    constants = blocks(config, num_experts, PRODUCT_ELEMENTS)
    slots = program_slots(constants, multiprocessors(device))
    return (routing_backward_products, {"NUM_EXPERTS": num_experts, **constants}), slots


def backward(
    d_routing_weights: Tensor, d_logits: Tensor | None, logits: Tensor, expert_ids: Tensor, normalize: bool
) -> Tensor:
    """Return the gradient of fp32 ``logits`` [N, n] from that of the weights and what arrives at them directly."""
    num_tokens, num_experts = logits.shape
    top_k, device = expert_ids.shape[1], logits.device
    total = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
    kernel, constants = kind("routing_backward", num_tokens, logits.dtype, device, num_experts, top_k, normalize)
    launch(
        kernel,
        (-(-num_tokens // constants["BLOCK_M"]),),
        d_routing_weights.contiguous(),
        None if d_logits is None else d_logits.contiguous(),
        logits.contiguous(),
        expert_ids,
        total,
        num_tokens,
        device=device,
        **constants,
    )
    return total


def products(
    total: Tensor, x: Tensor | None, router: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return d_x = total R [N, D] in ``dtype``, x's, for a ``router`` [n, D], and d_router = total^T x [n, D] in fp32
    for an ``x`` [N, D]; of total [N, n], the gradient of the logits in fp32. One launch, and where the tokens are split
    a sum over the splits.
    """
    (num_tokens, num_experts), device = total.shape, total.device
    given = x if router is None else router
    assert given is not None
    hidden = given.shape[1]
    size = num_tokens if num_tokens <= SKINNY_TOKENS else SKINNY_TOKENS + 1
    (kernel, constants), slots = _products_kind(size, dtype, device, num_experts)
    stripes = -(-hidden // constants["BLOCK_D"])
    splits, tiles = cut(-(-num_tokens // constants["BLOCK_M"]), max(stripes, 1), slots)
    stride_x = 0
    d_x = d_router = None
    if x is not None:
        x, stride_x = with_row_stride(x)
        d_router = torch.empty(splits, num_experts, hidden, dtype=torch.float32, device=device)
    if router is not None:
        router, d_x = router.contiguous(), torch.empty(num_tokens, hidden, dtype=dtype, device=device)
    launch(
        kernel,
        (stripes, splits),
        total.contiguous(),
        x,
        router,
        d_x,
        d_router,
        num_tokens,
        hidden,
        stride_x,
        tiles,
        device=device,
        **constants,
    )
    if d_router is not None:
        d_router = d_router[0] if splits == 1 else d_router.sum(dim=0)
    return d_x, d_router
