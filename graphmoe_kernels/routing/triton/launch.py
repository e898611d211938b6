"""How the routing kernels are launched: outputs, block sizes, precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.backend import per_device
from graphmoe_kernels.launching import SKINNY_TOKENS, Config, kernel_config, launch, power_of_two, with_row_stride

MAX_EXPERTS = 256  # a row's experts are handled in registers, all at once
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
    return _kind(name, class_tokens(num_tokens), dtype, device, *sizes)


def class_tokens(num_tokens: int) -> int:
    """One number of tokens for all of a size class: what is kept for the class is kept once."""
    return 1 if num_tokens <= SKINNY_TOKENS else SKINNY_TOKENS + 1


@per_device
def _kind(
    name: str, num_tokens: int, dtype: torch.dtype, device: torch.device, num_experts: int, top_k: int, normalize: bool
) -> Kind:
    from graphmoe_kernels.routing.triton import forward

    constants = {
        "NORMALIZE": normalize,
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "TOP_K_PADDED": power_of_two(top_k),
    }
    config = kernel_config(name, num_tokens, dtype, device)
    return getattr(forward, name), constants | blocks(config, num_experts)


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
