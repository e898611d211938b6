"""Registration of `graphmoe::expert_swiglu` with torch: schema, fake (shapes only) and backward.

As a registered operator the blocked loop is one opaque node for torch.compile and export: no graph break, whatever the
token count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.experts import pytorch
from graphmoe_kernels.experts.pytorch import Inputs, Settings


@torch.library.custom_op("graphmoe::expert_swiglu", mutates_args=())
def expert_swiglu_op(
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    fold_gate: Tensor | None,
    fold_up: Tensor | None,
    low_gate: Tensor,
    low_up: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    weights: Tensor,
    experts: Tensor,
    scale: float,
    activation: str,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `graphmoe_kernels.expert_swiglu`."""
    inputs = Inputs(gate, up, state, fold_gate, fold_up, low_gate, low_up, gate_B, up_B, down_A, weights, experts)
    return pytorch.forward(inputs, Settings(scale, activation, dropout, seed))


@expert_swiglu_op.register_fake
def _(gate, up, state, fold_gate, fold_up, low_gate, *rest):
    return gate.new_empty(gate.shape), low_gate.new_empty(low_gate.shape)


@torch.library.custom_op("graphmoe::expert_swiglu_backward", mutates_args=())
def expert_swiglu_backward_op(
    grad_c: Tensor,
    grad_z: Tensor,
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    fold_gate: Tensor | None,
    fold_up: Tensor | None,
    low_gate: Tensor,
    low_up: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    weights: Tensor,
    experts: Tensor,
    scale: float,
    activation: str,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """The gradients of the floating inputs in order; those of ``state`` and the folds only if there is a state."""
    inputs = Inputs(gate, up, state, fold_gate, fold_up, low_gate, low_up, gate_B, up_B, down_A, weights, experts)
    with torch.autocast(gate.device.type, enabled=False):  # whoever calls backward() inside autocast
        grads = pytorch.backward(grad_c, grad_z, inputs, Settings(scale, activation, dropout, seed))
    return [g.to(x.dtype) for g, x in zip(grads[:11], inputs[:11], strict=True) if g is not None and x is not None]


@expert_swiglu_backward_op.register_fake
def _(grad_c, grad_z, *rest):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in rest[:11] if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.activation, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, grad_c: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    found = iter(expert_swiglu_backward_op(grad_c, grad_z, *tensors, ctx.scale, ctx.activation, ctx.dropout, seed))
    floating = [None if x is None else next(found) for x in tensors[:11]]
    return (*floating, None, None, None, None, None)


expert_swiglu_op.register_autograd(_backward, setup_context=_setup_context)
