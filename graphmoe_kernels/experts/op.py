"""Registration of `graphmoe::expert_swiglu` with torch: schema, fake (shapes only) and backward.

As a registered operator a backend's loop or launch is one opaque node for torch.compile and export: no graph break,
whatever the token count. The schemas are made from `Inputs`, so that the tensors are listed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.experts import launch, pytorch
from graphmoe_kernels.experts.operands import FLOATING, OPTIONAL, Inputs, Settings

_TENSORS = ", ".join(f"Tensor{'?' if name in OPTIONAL else ''} {name}" for name in Inputs._fields)
_SETTINGS = (
    "float scale, str activation, float dropout, Tensor? gate_bias, Tensor? up_bias, Tensor? seed, Tensor? order, "
    "Tensor? tickets"
)
_COUNT = len(Inputs._fields)
_FLOATING = len(FLOATING)  # they come first

BACKENDS: dict[str, Any] = {"torch": pytorch, "triton": launch}


@torch.library.custom_op(
    "graphmoe::expert_swiglu",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SETTINGS}, str backend) -> (Tensor, Tensor)",
)
def expert_swiglu_op(*args: Any) -> tuple[Tensor, Tensor]:
    """See `graphmoe_kernels.expert_swiglu`. The tickets are counted in, and are zero again afterwards."""
    *rest, backend = args
    return BACKENDS[backend].forward(Inputs(*rest[:_COUNT]), Settings(*rest[_COUNT:]))


@expert_swiglu_op.register_fake
def _(*args):
    inputs = Inputs(*args[:_COUNT])
    n, r, _ = inputs.down_A.shape
    return inputs.gate.new_empty(inputs.gate.shape), inputs.gate.new_empty(inputs.gate.shape[0], n * r)


@torch.library.custom_op(
    "graphmoe::expert_swiglu_backward",
    mutates_args=(),
    schema=f"(Tensor grad_c, Tensor grad_z, {_TENSORS}, {_SETTINGS}, str backend, bool[] needed) -> Tensor[]",
)
def expert_swiglu_backward_op(*args: Any) -> list[Tensor]:
    """The gradients of those floating inputs that are ``needed``, in their order."""
    grad_c, grad_z, *rest, backend, needed = args
    inputs, settings = Inputs(*rest[:_COUNT]), Settings(*rest[_COUNT:])
    with torch.autocast(inputs.gate.device.type, enabled=False):  # whoever calls backward() inside autocast
        grads = BACKENDS[backend].backward(grad_c, grad_z, inputs, settings, needed)
    pairs = zip(grads[:_FLOATING], inputs[:_FLOATING], needed, strict=True)
    return [g.to(x.dtype).contiguous() for g, x, asked in pairs if asked and g is not None and x is not None]


@expert_swiglu_backward_op.register_fake
def _(grad_c, grad_z, *rest):
    *tensors, needed = rest
    floating = zip(tensors[:_FLOATING], needed, strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, asked in floating if asked]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *rest, ctx.backend = inputs
    settings = Settings(*rest[_COUNT:])
    ctx.plain = settings.scale, settings.activation, settings.dropout
    ctx.save_for_backward(*rest[:_COUNT], settings.gate_bias, settings.up_bias, settings.seed, settings.order)


def _backward(ctx: Any, grad_c: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, gate_bias, up_bias, seed, order = ctx.saved_tensors
    needed = [asked and x is not None for asked, x in zip(ctx.needs_input_grad, tensors[:_FLOATING], strict=False)]
    settings = (*ctx.plain, gate_bias, up_bias, seed, order, None)
    found = iter(expert_swiglu_backward_op(grad_c, grad_z, *tensors, *settings, ctx.backend, needed))
    without = (None,) * (1 + len(settings) + 1)  # experts, the settings, the backend
    return *(next(found) if asked else None for asked in needed), *without


expert_swiglu_op.register_autograd(_backward, setup_context=_setup_context)
