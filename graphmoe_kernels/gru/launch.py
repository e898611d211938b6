"""The host side of the GRU kernels: outputs, strides, configuration, launch."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.launching import by_rows, kernel_config, launch


def allocate_forward(inputs: Tensor, width: int, candidate: bool) -> tuple[Tensor, Tensor]:
    """The outputs of `forward`: [N, 2G], and the candidate [N, G] in fp32 if it is wanted, else an empty tensor."""
    tokens = inputs.shape[0]
    kept = inputs.new_empty((tokens, width) if candidate else (0,), dtype=torch.float32)
    return inputs.new_empty(tokens, 2 * width), kept


def forward(
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """See `graphmoe_kernels.gru.op.step`: one launch."""
    from graphmoe_kernels.gru.triton_kernels import gru_forward

    tokens, width, later = inputs.shape[0], candidate_bias.shape[0], state is not None
    out, candidate = allocate_forward(inputs, width, save and later)
    inputs, weight = by_rows(inputs), by_rows(candidate_weight)
    recurrent, state, total = (None if t is None else by_rows(t) for t in (recurrent, state, total))
    config = kernel_config("gru", "gru_forward", tokens, inputs.dtype, inputs.device)
    launch(
        gru_forward,
        _grid(tokens, width, config),
        inputs,
        recurrent,
        state,
        total,
        weight,
        candidate_bias.contiguous(),
        out,
        candidate,
        tokens,
        width,
        inputs.stride(0),
        _row_stride(recurrent),
        _row_stride(state),
        _row_stride(total),
        weight.stride(0),
        TANH=candidate_activation == "tanh",
        HAS_STATE=later,
        SAVE=save and later,
        device=inputs.device,
        **config,
    )
    return out, candidate


def allocate_backward(inputs: Tensor, width: int, state: bool, reset_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `backward` but for the bias's gradient: [N, 3G], and [N, G] for each one wanted, else empty."""
    tokens = inputs.shape[0]
    return (
        inputs.new_empty(tokens, 3 * width),
        inputs.new_empty((tokens, width) if state else (0,)),
        inputs.new_empty((tokens, width) if reset_state else (0,)),
    )


def backward(
    grad: Tensor,
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    candidate: Tensor,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
    reset_state: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `graphmoe_kernels.gru.op.step_backward`: one launch, and the sum of the token tiles' parts of the bias."""
    from graphmoe_kernels.gru.triton_kernels import gru_backward

    tokens, width, later = inputs.shape[0], candidate_bias.shape[0], state is not None
    d_inputs, d_state, kept = allocate_backward(inputs, width, later, reset_state)
    grad, inputs, weight = by_rows(grad), by_rows(inputs), by_rows(candidate_weight)
    recurrent, state = (None if t is None else by_rows(t) for t in (recurrent, state))
    config = kernel_config("gru", "gru_backward", tokens, inputs.dtype, inputs.device)
    tiles = -(-tokens // config["BLOCK_M"])
    d_bias = inputs.new_empty((tiles, width) if bias else (0,), dtype=torch.float32)
    launch(
        gru_backward,
        _grid(tokens, width, config),
        grad,
        inputs,
        recurrent,
        state,
        candidate,
        weight,
        candidate_bias.contiguous(),
        d_inputs,
        d_state,
        kept,
        d_bias,
        tokens,
        width,
        grad.stride(0),
        inputs.stride(0),
        _row_stride(recurrent),
        _row_stride(state),
        weight.stride(0),
        TANH=candidate_activation == "tanh",
        HAS_STATE=later,
        RESET_STATE=reset_state,
        BIAS=bias,
        device=inputs.device,
        **config,
    )
    return d_inputs, d_state, kept, d_bias.sum(0) if bias else d_bias


def _grid(tokens: int, width: int, config: dict[str, int]) -> tuple[int]:
    """One axis, as the others end at 65535 programs."""
    return (-(-tokens // config["BLOCK_M"]) * -(-width // config["BLOCK_G"]),)


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
