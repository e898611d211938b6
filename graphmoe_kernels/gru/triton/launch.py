"""The host side of the GRU kernels: outputs, strides, configuration, launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.backend import per_device
from graphmoe_kernels.launching import SKINNY_TOKENS, by_rows, kernel_config, launch

# A kernel, and everything that is the same in all its launches of a kind: constants, blocks, warps and stages.
Kind = tuple[Any, dict[str, Any]]


def kind(name: str, num_tokens: int, dtype: torch.dtype, device: torch.device, candidate_activation: str) -> Kind:
    """The kernel called ``name`` and the constants of its launches."""
    return _kind(name, 1 if num_tokens <= SKINNY_TOKENS else SKINNY_TOKENS + 1, dtype, device, candidate_activation)


@per_device
def _kind(name: str, num_tokens: int, dtype: torch.dtype, device: torch.device, candidate_activation: str) -> Kind:
    from graphmoe_kernels.gru.triton import backward, forward

    kernel = getattr(forward if name == "gru_forward" else backward, name)
    config = kernel_config(name, num_tokens, dtype, device)
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
    out = torch.empty(num_tokens, 2 * width, dtype=inputs.dtype, device=device)
    candidate = None
    if save and state is not None:
        candidate = torch.empty(num_tokens, width, dtype=torch.float32, device=device)
    kernel, constants = kind("gru_forward", num_tokens, inputs.dtype, device, candidate_activation)
    inputs, weight = by_rows(inputs), by_rows(candidate_weight)
    if state is not None and recurrent is not None and total is not None:
        recurrent, state, total = by_rows(recurrent), by_rows(state), by_rows(total)
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
        inputs.stride(0),
        _row_stride(recurrent),
        _row_stride(state),
        _row_stride(total),
        weight.stride(0),
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
    kernel, constants = kind("gru_backward", num_tokens, inputs.dtype, device, candidate_activation)
    d_inputs = inputs.new_empty(num_tokens, 3 * width)
    d_state = None if state is None else inputs.new_empty(num_tokens, width)
    reset_state = inputs.new_empty(num_tokens, width) if wants_reset_state else None
    tiles = -(-num_tokens // constants["BLOCK_M"])
    d_bias = torch.empty(tiles, width, dtype=torch.float32, device=device) if wants_bias else None
    grad, inputs, weight = by_rows(grad), by_rows(inputs), by_rows(candidate_weight)
    if state is not None and recurrent is not None:
        recurrent, state = by_rows(recurrent), by_rows(state)
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
        grad.stride(0),
        inputs.stride(0),
        _row_stride(recurrent),
        _row_stride(state),
        weight.stride(0),
        device=device,
        **constants,
    )
    return d_inputs, d_state, reset_state, None if d_bias is None else d_bias.sum(0)


def _grid(num_tokens: int, width: int, config: dict[str, int]) -> tuple[int]:
    """One axis, as the others end at 65535 programs."""
    return (-(-num_tokens // config["BLOCK_M"]) * -(-width // config["BLOCK_G"]),)


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
