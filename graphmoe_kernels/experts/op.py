"""Registration of `expert_swiglu` and `swiglu` with torch: schemas, fakes (shapes only), backward.

As a registered operator a backend's loop or launch is one opaque node for torch.compile and export: no graph break,
whatever the token count. The flat form of the operands is known here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels._ops import add_op_namespace_prefix
from graphmoe_kernels.backend import without_autocast
from graphmoe_kernels.experts import pytorch, pytorch_swiglu
from graphmoe_kernels.experts.operands import FLOATING, Dropout, ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton import launch

EXPERTS: dict[str, Any] = {"torch": pytorch, "triton": launch}
SWIGLU: dict[str, Any] = {"torch": pytorch_swiglu, "triton": launch}

_OPTIONAL = ("low_update", "state", "fold_gate", "fold_up", "gate_scale", "up_scale")
_SHARED = ("gate", "up", "state", "fold_gate", "fold_up")


def flatten(operands: ExpertOperands) -> tuple[Any, ...]:
    """The operands as the schema has them, ``dropout`` last."""
    rate = 0.0 if operands.dropout is None else operands.dropout.rate
    return *operands.floating(), *operands.constants(), rate


def unflatten(flat: Sequence[Any]) -> ExpertOperands:
    """The inverse of `flatten`."""
    gate, up, low, gate_B, up_B, down_A, weights, low_update, state, fold_gate, fold_up, *rest = flat
    gate_scale, up_scale, expert_ids, gate_bias, up_bias, seed, rate = rest
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
    )


def flatten_shared(pre_activations: GateUp, update: LowRankUpdate | None) -> tuple[Tensor | None, ...]:
    """The operands of `swiglu` as its schema has them."""
    return *pre_activations, *(update or (None, None, None))


def _unflatten_shared(flat: Sequence[Any]) -> tuple[GateUp, LowRankUpdate | None]:
    gate, up, *update = flat
    return GateUp(gate, up), None if update[0] is None else LowRankUpdate(*update)


def run_experts_flat(*args: Any) -> tuple[Tensor, Tensor]:
    """See `graphmoe_kernels.expert_swiglu`."""
    *flat, scale, activation, backend = args
    return EXPERTS[backend].forward(unflatten(flat), scale, activation)


def run_experts_backward_flat(*args: Any) -> list[Tensor]:
    """The gradients of those floating inputs that are ``needed``, in their order."""
    grad_hidden, grad_low_down, *flat, scale, activation, backend, needed = args
    operands = unflatten(flat)

    def backward(asked: frozenset[str]) -> dict[str, Tensor]:
        return EXPERTS[backend].backward(grad_hidden, grad_low_down, operands, scale, activation, asked)

    return _in_order(backward, FLOATING, flat, needed)


def run_swiglu_flat(*args: Any) -> Tensor:
    """See `graphmoe_kernels.swiglu`."""
    *flat, activation, backend = args
    return SWIGLU[backend].swiglu(*_unflatten_shared(flat), activation)


def run_swiglu_backward_flat(*args: Any) -> list[Tensor]:
    """The gradients of those inputs that are ``needed``, in their order."""
    grad_hidden, *flat, activation, backend, needed = args

    def backward(asked: frozenset[str]) -> dict[str, Tensor]:
        return SWIGLU[backend].swiglu_backward(grad_hidden, *_unflatten_shared(flat), activation, asked)

    return _in_order(backward, _SHARED, flat, needed)


def _in_order(
    backward: Callable[[frozenset[str]], dict[str, Tensor]],
    names: Sequence[str],
    inputs: Sequence[Any],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The ``needed`` gradients in the order of their inputs, the first ones, in these's dtypes."""
    floating = zip(names, inputs[: len(names)], needed, strict=True)
    asked = {name: x for name, x, wanted in floating if wanted and x is not None}
    with without_autocast(inputs[0]):  # whoever calls backward() inside autocast
        grads = backward(frozenset(asked))
        return [grads[name].to(x.dtype).contiguous() for name, x in asked.items()]


def _register(
    name: str,
    run: Callable[..., Any],
    run_backward: Callable[..., list[Tensor]],
    fake: Callable[..., Any],
    outputs: Sequence[str],
    floating: Sequence[str],
    rest: str,
) -> Any:
    """Register an operator and its backward, which gives the gradients of those ``floating`` inputs that need one.

    Args:
        name: of the operator.
        run, run_backward: what they do. The backward gets the outputs' gradients, the inputs, and which are needed.
        fake: the outputs' shapes.
        outputs, floating: names of tensors.
        rest: the schema of the other inputs, first the tensors.
    """
    inputs = ", ".join([*(f"Tensor{'?' if each in _OPTIONAL else ''} {each}" for each in floating), rest])
    found = "Tensor" if len(outputs) == 1 else f"({', '.join('Tensor' for _ in outputs)})"
    grads = ", ".join(f"Tensor grad_{each}" for each in outputs)
    count, tensors = len(floating), inputs.count("Tensor")
    schema = f"({inputs}) -> {found}"
    operator = torch.library.custom_op(add_op_namespace_prefix(name), run, mutates_args=(), schema=schema)
    backward_operator = torch.library.custom_op(
        add_op_namespace_prefix(f"{name}_backward"),
        run_backward,
        mutates_args=(),
        schema=f"({grads}, {inputs}, bool[] needed) -> Tensor[]",
    )

    def fake_backward(*args):
        asked = zip(args[len(outputs) : len(outputs) + count], args[-1], strict=True)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, wanted in asked if wanted]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.settings = inputs[tensors:]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
        needed = [asked and x is not None for asked, x in zip(wanted[:count], saved, strict=False)]
        found = iter(backward_operator(*grads, *saved, *ctx.settings, needed))
        return *(next(found) if asked else None for asked in needed), *(None for _ in wanted[count:])

    operator.register_fake(fake)
    backward_operator.register_fake(fake_backward)
    operator.register_autograd(backward, setup_context=save)
    return operator


def _experts_fake(*args: Any) -> tuple[Tensor, Tensor]:
    gate, _, _, _, _, down_A, *_ = args
    n, r, _ = down_A.shape
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape[0], n * r)


def _swiglu_fake(gate: Tensor, *rest: Any) -> Tensor:
    return gate.new_empty(gate.shape)


expert_swiglu_op = _register(
    "expert_swiglu",
    run_experts_flat,
    run_experts_backward_flat,
    _experts_fake,
    ("hidden", "low_down"),
    FLOATING,
    "Tensor expert_ids, Tensor? gate_bias, Tensor? up_bias, Tensor? seed, float dropout, "
    "float scale, str activation, str backend",
)
swiglu_op = _register(
    "swiglu",
    run_swiglu_flat,
    run_swiglu_backward_flat,
    _swiglu_fake,
    ("hidden",),
    _SHARED,
    "str activation, str backend",
)
