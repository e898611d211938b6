"""`gru_step` and its backward, registered with `torch.library`: schema, fake tensors, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels._ops import add_op_namespace_prefix
from graphmoe_kernels.backend import without_autocast
from graphmoe_kernels.gru.triton import launch


@torch.library.custom_op(add_op_namespace_prefix("gru_step"), mutates_args=())
def step(
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The Triton backend of `graphmoe_kernels.gru_step`: tensors of one dtype, but for the bias.

    With ``save`` the second output holds what a backward needs besides the inputs: the candidate c [N, G] in fp32.
    Without it, and in the first round, where c is cheap to compute again, that output is empty.
    """
    out, candidate = launch.step(
        inputs, recurrent, state, total, candidate_weight, candidate_bias, candidate_activation, save
    )
    return out, inputs.new_empty(0, dtype=torch.float32) if candidate is None else candidate


@step.register_fake
def _(inputs, recurrent, state, total, candidate_weight, candidate_bias, candidate_activation, save):
    num_tokens, width = inputs.shape[0], candidate_bias.shape[0]
    kept = (num_tokens, width) if save and state is not None else (0,)
    return inputs.new_empty(num_tokens, 2 * width), inputs.new_empty(kept, dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("gru_step_backward"), mutates_args=())
def step_backward(
    grad: Tensor,
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    candidate: Tensor,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
    wants_reset_state: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `step` from that of its output, grad [N, 2G].

    Returns:
        The gradient of ``inputs`` [N, 3G], whose first [N, 2G] is also that of ``recurrent``; of ``state`` [N, G] by
        the state update and the candidate (empty in the first round); where ``wants_reset_state``, q * h
        [N, G] as the candidate's product read it; where ``wants_bias``, the bias's gradient [G] in fp32. What
        is not asked for is empty.
    """
    d_inputs, d_state, reset_state, d_bias = launch.step_backward(
        grad,
        inputs,
        recurrent,
        state,
        candidate if candidate.numel() else None,
        candidate_weight,
        candidate_bias,
        candidate_activation,
        wants_reset_state,
        wants_bias,
    )
    return (
        d_inputs,
        inputs.new_empty(0) if d_state is None else d_state,
        inputs.new_empty(0) if reset_state is None else reset_state,
        inputs.new_empty(0, dtype=torch.float32) if d_bias is None else d_bias,
    )


@step_backward.register_fake
def _(grad, inputs, recurrent, state, candidate, weight, candidate_bias, activation, wants_reset_state, wants_bias):
    num_tokens, width = inputs.shape[0], candidate_bias.shape[0]
    return (
        inputs.new_empty(num_tokens, 3 * width),
        inputs.new_empty((num_tokens, width) if state is not None else (0,)),
        inputs.new_empty((num_tokens, width) if wants_reset_state else (0,)),
        inputs.new_empty((width,) if wants_bias else (0,), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, recurrent, state, _, weight, bias, ctx.candidate_activation, ctx.save = inputs
    ctx.set_materialize_grads(False)  # the candidate's gradient is never read: no zeros for it
    ctx.save_for_backward(u, recurrent, state, output[1], weight, bias)


def _columns(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Columns of a gradient that is read elsewhere too. Of a single row they would be contiguous, and autograd may
    then keep a contiguous gradient as a leaf's ``grad`` without a copy: two of them would share memory."""
    columns = tensor[:, start:stop]
    return columns.clone() if tensor.shape[0] == 1 else columns


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    if not ctx.save:
        raise RuntimeError("gru_step was called with save=False, which leaves no backward; pass save=True")
    inputs, recurrent, state, candidate, weight, bias = ctx.saved_tensors
    _, needs_recurrent, needs_state, needs_total, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    width, later = bias.shape[0], state is not None
    needs_weight = later and needs_weight
    d_inputs, d_state, reset_state, d_bias = step_backward(
        grad, inputs, recurrent, state, candidate, weight, bias, ctx.candidate_activation, needs_weight, needs_bias
    )
    d_weight = None
    if needs_weight:
        with without_autocast(d_inputs):
            d_weight = d_inputs[:, 2 * width :].T @ reset_state  # [G, G]
    return (
        d_inputs,
        _columns(d_inputs, 0, 2 * width) if later and needs_recurrent else None,
        d_state if later and needs_state else None,
        _columns(grad, width, 2 * width) if later and needs_total else None,
        d_weight,
        d_bias.to(bias.dtype) if needs_bias else None,
        None,
        None,
    )


step.register_autograd(_backward, setup_context=_setup_context)
