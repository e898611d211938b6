"""The order of tokens in which neighbours share experts, for kernels that work on tiles of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend
from graphmoe_kernels.launching import kernel_config, launch
from graphmoe_kernels.routing.launch import MAX_EXPERTS
from graphmoe_kernels.validation import check_tensor

# Tokens are ordered within windows of this size: the work a token grows with the window, and a window's tokens are
# enough to fill tiles of any combination of experts. Window, and two experts below 256, make keys of 30 bits.
ORDER_WINDOW = 16384


def expert_order(experts: Tensor) -> Tensor:
    """The order that brings tokens with the same experts together: int32 [N], a permutation of 0..N-1.

    Sorts each window of `ORDER_WINDOW` tokens, stably, by their two smallest experts (for k = 1 by the one), so that
    ``experts[order]`` has runs of equal experts. Deterministic; without gradient. Triton only: the other backends
    work on no tiles of tokens.

    Args:
        experts: [N, k], int64, int32, int16 or uint8; values in 0..255. A GPU does not read them back: with other
            values there the order is no permutation.

    Raises:
        TypeError: ``experts`` is no dense tensor of an integer dtype.
        ValueError: not of two dimensions, Triton cannot run where it is, or on the CPU (in Triton's interpreter) a
            value outside of 0..255.
    """
    check_tensor("experts", experts)
    if experts.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"experts must be int64, int32, int16 or uint8, got {experts.dtype}")
    if experts.dim() != 2 or experts.shape[1] == 0:
        raise ValueError(f"experts must be [tokens, top_k], got shape {tuple(experts.shape)}")
    resolve_backend("triton", "experts", experts.new_empty(0, dtype=torch.float32))  # asks where, not in which dtype
    return expert_order_op(experts)


@torch.library.custom_op("graphmoe::expert_order", mutates_args=())
def expert_order_op(experts: Tensor) -> Tensor:
    """See `expert_order`."""
    from graphmoe_kernels.routing.triton_order import order_tokens

    if experts.device.type == "cpu" and bool(((experts < 0) | (experts >= MAX_EXPERTS)).any()):
        raise ValueError(f"experts must be in 0..{MAX_EXPERTS - 1}, got {int(experts.min())} to {int(experts.max())}")
    experts = experts.contiguous()
    tokens, top_k = experts.shape
    order = experts.new_empty(tokens, dtype=torch.int32)
    config = kernel_config("routing", "order", tokens, experts.dtype, experts.device)
    launch(
        order_tokens,
        (-(-tokens // config["BLOCK_N"]),),
        *(experts, order, tokens),
        device=experts.device,
        TOP_K=top_k,
        WINDOW=ORDER_WINDOW,
        MAX_EXPERTS=MAX_EXPERTS,
        **config,
    )
    return order


@expert_order_op.register_fake
def _(experts):
    return experts.new_empty(experts.shape[0], dtype=torch.int32)
