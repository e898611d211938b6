"""The expert operators on Triton: which kernels a call runs, forward and backward.

Forward and the tokens' backward run a program for every tile of tokens and split of F; the experts' backward one for
every tile of columns and split of the tokens. Splits are as many as keep every multiprocessor busy.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton import launch_stream
from graphmoe_kernels.experts.triton.counters import counters, forget
from graphmoe_kernels.experts.triton.gradients import (
    OF_EXPERTS,
    TokenGradients,
    empty_token_gradients,
    no_weight_sums,
    update_gradients,
)
from graphmoe_kernels.experts.triton.layout import RowStrides, readable, readable_shared
from graphmoe_kernels.experts.triton.plan import (
    Plan,
    backward_weights_plan,
    lists,
    swiglu_plan,
    tokens_plan,
)
from graphmoe_kernels.experts.triton.sizes import Sizes, inner, sizes
from graphmoe_kernels.launching import launch


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, imported by the first call, as Triton may be missing where nothing runs on it."""
    from graphmoe_kernels.experts.triton.backward_tokens import experts_backward_tokens
    from graphmoe_kernels.experts.triton.backward_weights import experts_backward_weights
    from graphmoe_kernels.experts.triton.forward import experts_forward
    from graphmoe_kernels.experts.triton.swiglu import swiglu_backward, swiglu_forward

    return SimpleNamespace(
        forward=experts_forward,
        backward_tokens=experts_backward_tokens,
        backward_weights=experts_backward_weights,
        swiglu_forward=swiglu_forward,
        swiglu_backward=swiglu_backward,
    )


def forward(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r], as a stream where that suits; see `graphmoe_kernels.expert_swiglu`."""
    operands, strides = readable(operands)
    size, gate = sizes(operands), operands.pre_activations.gate
    if launch_stream.suits(size, gate.dtype):
        return launch_stream.forward(operands, strides, size, scale, activation)
    plan = tokens_plan("forward", size, activation, gate.dtype, gate.device)
    hidden = gate.new_empty((size.tokens, size.width))
    low_down = gate.new_empty((size.tokens, size.num_experts * size.rank))
    scratch = gate.new_empty((plan.scratch,), dtype=torch.float32)
    _launch_counting(
        _kernels().forward, plan, gate.device, (operands, strides, hidden, low_down, scratch),
        (size.tokens, size.width, inner(operands.update), size.num_experts, scale),
    )  # fmt: skip
    return hidden, low_down


def _launch_counting(
    kernel: Any, plan: Plan, device: torch.device, tensors: tuple[Any, ...], numbers: tuple[Any, ...]
) -> None:
    """Launch a kernel whose tiles count their splits; its counters stand between tensors and numbers."""
    try:
        zeros = counters(device, plan.grid[0])
        launch(kernel, plan.grid, *tensors, zeros, *numbers, device=device, **plan.constants)
    except BaseException:
        forget(device)
        raise


def backward(
    grad_hidden: Tensor,
    grad_low_down: Tensor,
    operands: ExpertOperands,
    scale: float,
    activation: str,
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of the ``needed`` floating operands, by their names in `FLOATING`, and perhaps others."""
    operands, strides = readable(operands)
    grads = grad_hidden.contiguous(), grad_low_down.contiguous()
    size, gate = sizes(operands), operands.pre_activations.gate
    if launch_stream.suits(size, gate.dtype):
        tokens, of_experts = launch_stream.backward(grads, operands, strides, size, scale, activation, needed)
    else:
        tokens, present = _backward_tokens(grads, operands, strides, size, scale, activation)
        of_experts = {}
        if needed & OF_EXPERTS:
            of_experts = _backward_weights(grads, operands, strides, size, scale, activation, present)
    found = tokens._asdict() | of_experts
    if "low_update" in needed:
        found["low_update"] = tokens.low.clone()
    return found | update_gradients(GateUp(tokens.gate, tokens.up), operands.update, needed)


def _backward_tokens(
    grads: tuple[Tensor, Tensor],
    operands: ExpertOperands,
    strides: RowStrides,
    size: Sizes,
    scale: float,
    activation: str,
) -> tuple[TokenGradients, Tensor]:
    """Gradients of what belongs to tokens, and the tiles' lists of experts for the second kernel."""
    gate = operands.pre_activations.gate
    plan = tokens_plan("backward_tokens", size, activation, gate.dtype, gate.device)
    found = empty_token_gradients(gate, size)
    scratch = gate.new_empty((plan.scratch,), dtype=torch.float32)
    present = gate.new_empty((lists(math.prod(plan.grid), size),), dtype=torch.int32)
    _launch_counting(
        _kernels().backward_tokens, plan, gate.device, (operands, strides, *grads, found, scratch, present),
        (size.tokens, size.width, inner(operands.update), size.num_experts, scale),
    )  # fmt: skip
    return found, present


def _backward_weights(
    grads: tuple[Tensor, Tensor],
    operands: ExpertOperands,
    strides: RowStrides,
    size: Sizes,
    scale: float,
    activation: str,
    present: Tensor,
) -> dict[str, Tensor]:
    """Gradients of what belongs to experts, fp32, by name."""
    gate = operands.pre_activations.gate
    plan = backward_weights_plan(size, activation, gate.dtype, gate.device)
    _, splits = plan.grid
    sums = no_weight_sums(gate, size, splits, operands.scales is not None)
    launch(
        _kernels().backward_weights, plan.grid, operands, strides, *grads, sums, present, size.tokens, size.width,
        inner(operands.update), size.num_experts, scale, device=gate.device, **plan.constants,
    )  # fmt: skip
    return sums.total()


def swiglu(pre_activations: GateUp, update: LowRankUpdate | None, activation: str) -> Tensor:
    """hidden [N, F] without experts; see `graphmoe_kernels.swiglu`."""
    pre_activations, update, strides = readable_shared(pre_activations, update)
    gate = pre_activations.gate
    tokens, width = gate.shape
    plan = swiglu_plan("forward", tokens, width, activation, gate.dtype, gate.device)
    hidden = gate.new_empty((tokens, width))
    launch(
        _kernels().swiglu_forward, plan.grid, pre_activations, update, strides, hidden, tokens, width, inner(update),
        device=gate.device, **plan.constants,
    )  # fmt: skip
    return hidden


def swiglu_backward(
    grad_hidden: Tensor,
    pre_activations: GateUp,
    update: LowRankUpdate | None,
    activation: str,
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of `swiglu`, as `backward` gives them."""
    pre_activations, update, strides = readable_shared(pre_activations, update)
    gate = pre_activations.gate
    tokens, width = gate.shape
    plan = swiglu_plan("backward_tokens", tokens, width, activation, gate.dtype, gate.device)
    found = GateUp(gate.new_empty((tokens, width)), gate.new_empty((tokens, width)))
    launch(
        _kernels().swiglu_backward, plan.grid, pre_activations, update, strides, grad_hidden.contiguous(), found,
        tokens, width, inner(update), device=gate.device, **plan.constants,
    )  # fmt: skip
    return found._asdict() | update_gradients(found, update, needed)
