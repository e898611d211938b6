"""Registration of `graphmoe::expert_swiglu` and `graphmoe::swiglu` with torch: schemas, fakes (shapes only), backward.

As a registered operator a backend's loop or launch is one opaque node for torch.compile and export: no graph break,
whatever the token count. The flat form of the operands is known here alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.experts import pytorch, pytorch_swiglu
from graphmoe_kernels.experts.operands import FLOATING, Dropout, ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton import launch

EXPERTS: dict[str, Any] = {"torch": pytorch, "triton": launch}
SWIGLU: dict[str, Any] = {"torch": pytorch_swiglu, "triton": launch}

_OPTIONAL = ("low_update", "state", "fold_gate", "fold_up", "gate_scale", "up_scale")
_TENSORS = ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in FLOATING)
_REST = (
    "Tensor expert_ids, Tensor? gate_bias, Tensor? up_bias, Tensor? seed, Tensor? token_order, float dropout, "
    "float scale, str activation, str backend"
)
_COUNT = len(FLOATING)
_CONSTANTS = 5  # tensors without a gradient


def flatten(operands: ExpertOperands) -> tuple[Any, ...]:
    """The operands as the schema has them, ``dropout`` last."""
    rate = 0.0 if operands.dropout is None else operands.dropout.rate
    return *operands.floating(), *operands.constants(), rate


def unflatten(flat: Sequence[Any]) -> ExpertOperands:
    """The inverse of `flatten`."""
    gate, up, low, gate_B, up_B, down_A, weights, low_update, state, fold_gate, fold_up, *rest = flat
    gate_scale, up_scale, expert_ids, gate_bias, up_bias, seed, token_order, rate = rest
    return ExpertOperands(
        GateUp(gate, up),
        low,
        GateUp(gate_B, up_B),
        down_A,
        weights,
        expert_ids,
        low_update=low_update,
        update=None if state is None else LowRankUpdate(state, fold_gate, fold_up),
        scales=None if gate_scale is None else GateUp(gate_scale, up_scale),
        biases=None if gate_bias is None else GateUp(gate_bias, up_bias),
        dropout=None if seed is None else Dropout(rate, seed),
        token_order=token_order,
    )


def _in_order(
    grads: dict[str, Tensor], names: Sequence[str], tensors: Iterable[Tensor | None], needed: Sequence[bool]
) -> list[Tensor]:
    """The ``needed`` gradients in the order of their inputs, in these's dtypes."""
    return [
        grads[name].to(x.dtype).contiguous()
        for name, x, asked in zip(names, tensors, needed, strict=True)
        if asked and x is not None
    ]


def _asked(names: Sequence[str], needed: Sequence[bool]) -> frozenset[str]:
    return frozenset(name for name, asked in zip(names, needed, strict=True) if asked)


def run_experts_flat(*args: Any) -> tuple[Tensor, Tensor]:
    """See `graphmoe_kernels.expert_swiglu`."""
    *flat, scale, activation, backend = args
    return EXPERTS[backend].forward(unflatten(flat), scale, activation)


expert_swiglu_op = torch.library.custom_op(
    "graphmoe::expert_swiglu",
    run_experts_flat,
    mutates_args=(),
    schema=f"({_TENSORS}, {_REST}) -> (Tensor, Tensor)",
)


@expert_swiglu_op.register_fake
def _(*args):
    gate, _, _, _, _, down_A, *_ = args
    n, r, _ = down_A.shape
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[0], n * r)


def run_experts_backward_flat(*args: Any) -> list[Tensor]:
    """The gradients of those floating inputs that are ``needed``, in their order."""
    grad_hidden, grad_low_down, *flat, scale, activation, backend, needed = args
    operands = unflatten(flat)
    with torch.autocast(grad_hidden.device.type, enabled=False):  # whoever calls backward() inside autocast
        asked = _asked(FLOATING, needed)
        grads = EXPERTS[backend].backward(grad_hidden, grad_low_down, operands, scale, activation, asked)
        return _in_order(grads, FLOATING, operands.floating(), needed)


expert_swiglu_backward_op = torch.library.custom_op(
    "graphmoe::expert_swiglu_backward",
    run_experts_backward_flat,
    mutates_args=(),
    schema=f"(Tensor grad_hidden, Tensor grad_low_down, {_TENSORS}, {_REST}, bool[] needed) -> Tensor[]",
)


@expert_swiglu_backward_op.register_fake
def _(grad_hidden, grad_low_down, *rest):
    *tensors, needed = rest
    floating = zip(tensors[:_COUNT], needed, strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, asked in floating if asked]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[: _COUNT + _CONSTANTS])
    ctx.plain = inputs[_COUNT + _CONSTANTS :]


def _backward(ctx: Any, grad_hidden: Tensor, grad_low_down: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needed = [asked and x is not None for asked, x in zip(ctx.needs_input_grad, tensors[:_COUNT], strict=False)]
    found = iter(expert_swiglu_backward_op(grad_hidden, grad_low_down, *tensors, *ctx.plain, needed))
    return *(next(found) if asked else None for asked in needed), *(None,) * (_CONSTANTS + len(ctx.plain))


expert_swiglu_op.register_autograd(_backward, setup_context=_setup_context)


_SHARED = ("gate", "up", "state", "fold_gate", "fold_up")
_SHARED_TENSORS = "Tensor gate, Tensor up, Tensor? state, Tensor? fold_gate, Tensor? fold_up"


def flatten_shared(pre_activations: GateUp, update: LowRankUpdate | None) -> tuple[Tensor | None, ...]:
    """The operands of `swiglu` as its schema has them."""
    return *pre_activations, *(update or (None, None, None))


def _unflatten_shared(flat: Sequence[Any]) -> tuple[GateUp, LowRankUpdate | None]:
    gate, up, state, fold_gate, fold_up = flat
    return GateUp(gate, up), None if state is None else LowRankUpdate(state, fold_gate, fold_up)


def run_swiglu_flat(*args: Any) -> Tensor:
    """See `graphmoe_kernels.swiglu`."""
    *flat, activation, backend = args
    return SWIGLU[backend].swiglu(*_unflatten_shared(flat), activation)


swiglu_op = torch.library.custom_op(
    "graphmoe::swiglu",
    run_swiglu_flat,
    mutates_args=(),
    schema=f"({_SHARED_TENSORS}, str activation, str backend) -> Tensor",
)


@swiglu_op.register_fake
def _(gate, *rest):
    return gate.new_empty(gate.shape)


def run_swiglu_backward_flat(*args: Any) -> list[Tensor]:
    """The gradients of those inputs that are ``needed``, in their order."""
    grad_hidden, *flat, activation, backend, needed = args
    with torch.autocast(grad_hidden.device.type, enabled=False):  # whoever calls backward() inside autocast
        asked = _asked(_SHARED, needed)
        grads = SWIGLU[backend].swiglu_backward(grad_hidden, *_unflatten_shared(flat), activation, asked)
        return _in_order(grads, _SHARED, flat, needed)


swiglu_backward_op = torch.library.custom_op(
    "graphmoe::swiglu_backward",
    run_swiglu_backward_flat,
    mutates_args=(),
    schema=f"(Tensor grad_hidden, {_SHARED_TENSORS}, str activation, str backend, bool[] needed) -> Tensor[]",
)


@swiglu_backward_op.register_fake
def _(grad_hidden, *rest):
    *tensors, _, _, needed = rest
    floating = zip(tensors, needed, strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, asked in floating if asked]


def _setup_swiglu_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _swiglu_backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needed = [asked and x is not None for asked, x in zip(ctx.needs_input_grad, tensors, strict=False)]
    found = iter(swiglu_backward_op(grad_hidden, *tensors, ctx.activation, ctx.backend, needed))
    return *(next(found) if asked else None for asked in needed), None, None


swiglu_op.register_autograd(_swiglu_backward, setup_context=_setup_swiglu_context)
