"""The expert operators on Triton: which kernels a call runs, forward and backward.

Few tokens run a program for every tile of tokens, or token, and block of F; many tokens, and every backward, run as a
stream (`launch_stream`).
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import ExpertOperands, ExpertsOutput, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton import launch_stream
from graphmoe_kernels.experts.triton.counters import counters, forget
from graphmoe_kernels.experts.triton.gradients import update_gradients
from graphmoe_kernels.experts.triton.layout import RowStrides, readable, readable_shared
from graphmoe_kernels.experts.triton.plan import Plan, forward_plan, swiglu_plan, token_plan
from graphmoe_kernels.experts.triton.sizes import Sizes, inner, sizes
from graphmoe_kernels.launching import SKINNY_TOKENS, SMALLEST_TILE, launch

# Up to `SKINNY_TOKENS` tokens the experts run in tiles: at 64, where the stream comes closest, three rounds of a layer
# are predicted to take 328 us with tiles and 431 with the stream (H100; n = 64: 480 and 502).
# Up to so many tokens each has programs of its own: they read M from the L2 cache once more per token, which at two
# takes as long as reading it from memory once (H100: 24 MB at 3.0 TB/s, 48 MB at 5.5 TB/s), and share no product.
ALONE = 2


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, imported by the first call, as Triton may be missing where nothing runs on it."""
    from graphmoe_kernels.experts.triton.forward import experts_forward
    from graphmoe_kernels.experts.triton.swiglu import swiglu_backward, swiglu_forward
    from graphmoe_kernels.experts.triton.token import experts_forward_token

    return SimpleNamespace(
        forward=experts_forward,
        forward_token=experts_forward_token,
        swiglu_forward=swiglu_forward,
        swiglu_backward=swiglu_backward,
    )


def forward(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r], as a stream of many tokens; see `graphmoe_kernels.expert_swiglu`."""
    operands, strides = readable(operands)
    size, gate = sizes(operands), operands.pre_activations.gate
    if size.tokens > SKINNY_TOKENS:
        return launch_stream.forward(operands, strides, size, scale, activation)
    hidden = gate.new_empty((size.tokens, size.width))
    low_down = gate.new_empty((size.tokens, size.num_experts * size.rank))
    _forward(operands, strides, size, scale, activation, (hidden, low_down))
    return hidden, low_down


def forward_beside(operands: ExpertOperands, scale: float, activation: str) -> ExpertsOutput:
    """`forward` of few tokens with both outputs side by side in one tensor, where its rows stay aligned."""
    size = sizes(operands)
    columns = size.num_experts * size.rank
    if size.tokens > SKINNY_TOKENS or size.width % SMALLEST_TILE or columns % SMALLEST_TILE:
        return ExpertsOutput(*forward(operands, scale, activation))
    operands, strides = readable(operands)
    both = operands.pre_activations.gate.new_empty((size.tokens, size.width + columns))
    hidden, low_down = both.split_with_sizes((size.width, columns), dim=1)
    _forward(operands, strides, size, scale, activation, (hidden, low_down))
    return ExpertsOutput(hidden, low_down, both)


def _forward(
    operands: ExpertOperands,
    strides: RowStrides,
    size: Sizes,
    scale: float,
    activation: str,
    outputs: tuple[Tensor, Tensor],
) -> None:
    """Write hidden and low_down, whose rows may lie apart."""
    gate, (hidden, low_down) = operands.pre_activations.gate, outputs
    if size.tokens <= ALONE:
        kernel, plan = _kernels().forward_token, token_plan(size, activation, gate.dtype, gate.device)
    else:
        kernel, plan = _kernels().forward, forward_plan(size, activation, gate.dtype, gate.device)
    scratch = gate.new_empty((plan.scratch,), dtype=torch.float32)
    written = hidden, hidden.stride(0), low_down, low_down.stride(0)
    _launch_counting(
        kernel, plan, gate.device, (operands, strides, *written, scratch),
        (size.tokens, size.width, inner(operands.update), size.num_experts, scale),
    )  # fmt: skip


def _launch_counting(
    kernel: Any, plan: Plan, device: torch.device, tensors: tuple[Any, ...], numbers: tuple[Any, ...]
) -> None:
    """Launch a kernel whose tiles count their splits; its counters stand between tensors and numbers."""
    try:
        zeros = counters(device, plan.counters)
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
