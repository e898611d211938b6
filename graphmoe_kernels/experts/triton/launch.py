"""The expert operators on Triton: which kernels a call runs, forward and backward.

Few tokens run a program for every tile of tokens and split of F, as many as keep every multiprocessor busy; many
tokens, and every backward, run as a stream (`launch_stream`).
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton import launch_stream
from graphmoe_kernels.experts.triton.counters import counters, forget
from graphmoe_kernels.experts.triton.gradients import (
    update_gradients,
)
from graphmoe_kernels.experts.triton.layout import RowStrides, readable, readable_shared
from graphmoe_kernels.experts.triton.plan import Plan, forward_plan, swiglu_plan
from graphmoe_kernels.experts.triton.sizes import inner, sizes
from graphmoe_kernels.launching import SKINNY_TOKENS, launch


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, imported by the first call, as Triton may be missing where nothing runs on it."""
    from graphmoe_kernels.experts.triton.forward import experts_forward
    from graphmoe_kernels.experts.triton.swiglu import swiglu_backward, swiglu_forward

    return SimpleNamespace(
        forward=experts_forward,
        swiglu_forward=swiglu_forward,
        swiglu_backward=swiglu_backward,
    )


def forward(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r], as a stream of many tokens; see `graphmoe_kernels.expert_swiglu`."""
    operands, strides = readable(operands)
    size, gate = sizes(operands), operands.pre_activations.gate
    if size.tokens > SKINNY_TOKENS:
        return launch_stream.forward(operands, strides, size, scale, activation)
    plan = forward_plan(size, activation, gate.dtype, gate.device)
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
    tokens, of_experts = launch_stream.backward(grads, operands, strides, sizes(operands), scale, activation, needed)
    found = tokens._asdict() | of_experts
    if "low_update" in needed:
        found["low_update"] = tokens.low.clone()
    return found | update_gradients(GateUp(tokens.gate, tokens.up), operands.update, needed)


def swiglu(pre_activations: GateUp, update: LowRankUpdate | None, activation: str) -> Tensor:
    """hidden [N, F] without experts; see `graphmoe_kernels.swiglu`."""
    pre_activations, update, strides = _added(*readable_shared(pre_activations, update))
    gate = pre_activations.gate
    tokens, width = gate.shape
    plan = swiglu_plan("swiglu_forward", tokens, width, activation, gate.dtype, gate.device)
    hidden = gate.new_empty((tokens, width))
    launch(
        _kernels().swiglu_forward, plan.grid, pre_activations, update, strides, hidden, tokens, width, inner(update),
        device=gate.device, **plan.constants,
    )  # fmt: skip
    return hidden


def _added(
    pre_activations: GateUp, update: LowRankUpdate | None, strides: RowStrides
) -> tuple[GateUp, LowRankUpdate | None, RowStrides]:
    """What a kernel is given: the update of many tokens is added by cuBLAS, that of few by the kernel itself."""
    if update is None or len(update.state) <= SKINNY_TOKENS:
        return pre_activations, update, strides
    gate = torch.addmm(pre_activations.gate, update.state, update.gate.T)
    return readable_shared(GateUp(gate, torch.addmm(pre_activations.up, update.state, update.up.T)), None)


def swiglu_backward(
    grad_hidden: Tensor,
    pre_activations: GateUp,
    update: LowRankUpdate | None,
    activation: str,
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients of `swiglu`, as `backward` gives them."""
    pre_activations, update, strides = readable_shared(pre_activations, update)
    pre_activations, own, strides = _added(pre_activations, update, strides)
    gate = pre_activations.gate
    tokens, width = gate.shape
    plan = swiglu_plan("swiglu_backward", tokens, width, activation, gate.dtype, gate.device)
    found = GateUp(gate.new_empty((tokens, width)), gate.new_empty((tokens, width)))
    launch(
        _kernels().swiglu_backward, plan.grid, pre_activations, own, strides, grad_hidden.contiguous(), found,
        tokens, width, inner(own), device=gate.device, **plan.constants,
    )  # fmt: skip
    return found._asdict() | update_gradients(found, update, needed)
