"""The host side of the GRU kernels: outputs, strides, configuration, launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.backend import per_device
from graphmoe_kernels.launching import SKINNY_TOKENS, kernel_config, launch, with_row_stride

# A kernel, and everything that is the same in all its launches of a kind: constants, blocks, warps and stages.
Kind = tuple[Any, dict[str, Any]]


def kind(
    name: str, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device, candidate_activation: str
) -> Kind:
    """The kernel called ``name`` and the constants of its launches.

    Of a width that is no multiple of 16, as the literal loop's may be, rows and column blocks are not aligned: their
    loads take more registers, so that kernels have smaller blocks, the configurations named ``..._unaligned``.
    """
    tokens = 1 if num_tokens <= SKINNY_TOKENS else SKINNY_TOKENS + 1
    return _kind(name, tokens, width % 16 == 0, dtype, device, candidate_activation)


@per_device
def _kind(
    name: str, num_tokens: int, aligned: bool, dtype: torch.dtype, device: torch.device, candidate_activation: str
) -> Kind:
    from graphmoe_kernels.gru.triton import backward, forward

    kernel = getattr(forward if name == "gru_forward" else backward, name)
    config = kernel_config(name if aligned else f"{name}_unaligned", num_tokens, dtype, device)
    return kernel, {"TANH": candidate_activation == "tanh", **config}


def step(
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return h' beside H', and with ``save`` in a later round the candidate: one launch.

    See `graphmoe_kernels.gru.op.step`.
    """
    num_tokens, width, device = inputs.shape[0], candidate_bias.shape[0], inputs.device
    out = inputs.new_empty((num_tokens, 2 * width))
    candidate = None
    if save and state is not None:
        candidate = torch.empty(num_tokens, width, dtype=torch.float32, device=device)
    kernel, constants = kind("gru_forward", num_tokens, width, inputs.dtype, device, candidate_activation)
    inputs, stride_inputs = with_row_stride(inputs)
    weight, stride_weight = with_row_stride(candidate_weight)
    stride_recurrent = stride_state = stride_total = 0
    if state is not None and recurrent is not None and total is not None:
        recurrent, stride_recurrent = with_row_stride(recurrent)
        state, stride_state = with_row_stride(state)
        total, stride_total = with_row_stride(total)
    launch(
        kernel,
        _grid(num_tokens, width, constants),
        inputs,
        recurrent,
        state,
        total,
        weight,
        candidate_bias.contiguous(),
        out,
        candidate,
        num_tokens,
        width,
        stride_inputs,
        stride_recurrent,
        stride_state,
        stride_total,
        stride_weight,
        device=device,
        **constants,
    )
    return out, candidate


def step_backward(
    grad: Tensor,
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    candidate: Tensor | None,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
    wants_reset_state: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `graphmoe_kernels.gru.op.step_backward`, None for what is not there.

    One launch, and the sum of the token tiles' parts of the bias.
    """
    num_tokens, width, device = inputs.shape[0], candidate_bias.shape[0], inputs.device
    kernel, constants = kind("gru_backward", num_tokens, width, inputs.dtype, device, candidate_activation)
    d_inputs = inputs.new_empty(num_tokens, 3 * width)
    d_state = None if state is None else inputs.new_empty(num_tokens, width)
    reset_state = inputs.new_empty(num_tokens, width) if wants_reset_state else None
    tiles = -(-num_tokens // constants["BLOCK_M"])
    d_bias = torch.empty(tiles, width, dtype=torch.float32, device=device) if wants_bias else None
    grad, stride_grad = with_row_stride(grad)
    inputs, stride_inputs = with_row_stride(inputs)
    weight, stride_weight = with_row_stride(candidate_weight)
    stride_recurrent = stride_state = 0
    if state is not None and recurrent is not None:
        recurrent, stride_recurrent = with_row_stride(recurrent)
        state, stride_state = with_row_stride(state)
    launch(
        kernel,
        _grid(num_tokens, width, constants),
        grad,
        inputs,
        recurrent,
        state,
        candidate,
        weight,
        candidate_bias.contiguous(),
        d_inputs,
        d_state,
        reset_state,
        d_bias,
        num_tokens,
        width,
        stride_grad,
        stride_inputs,
        stride_recurrent,
        stride_state,
        stride_weight,
        device=device,
        **constants,
    )
    return d_inputs, d_state, reset_state, None if d_bias is None else d_bias.sum(0)


def _grid(num_tokens: int, width: int, config: dict[str, int]) -> tuple[int]:
    """One axis, as the others end at 65535 programs."""
    return (-(-num_tokens // config["BLOCK_M"]) * -(-width // config["BLOCK_G"]),)
