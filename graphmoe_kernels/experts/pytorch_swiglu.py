"""act(g) * u without experts on PyTorch: block by block of tokens, as the expert round, with nothing wide saved.

Half-precision inputs are computed in fp32 within a block and rounded once on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts.operands import GateUp, LowRankUpdate
from graphmoe_kernels.experts.pytorch_blocks import add_update_gradients, blocks, compute_dtype, updated
from graphmoe_kernels.structures import cast_tensor


def swiglu(pre_activations: GateUp, update: LowRankUpdate | None, activation: str) -> Tensor:
    """hidden [N, F]; see `graphmoe_kernels.swiglu`."""
    act, gate = get_activation(activation).function, pre_activations.gate
    dtype, spans = compute_dtype(gate.dtype), list(blocks(gate))
    if len(spans) == 1:
        g, u = updated(pre_activations, update)
        return cast_tensor(act(cast_tensor(g, dtype)) * cast_tensor(u, dtype), gate.dtype)
    hidden = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for span in spans:
        g, u = updated(pre_activations, update, span)
        hidden[span] = act(cast_tensor(g, dtype)) * cast_tensor(u, dtype)
    return hidden


def swiglu_backward(
    grad_hidden: Tensor,
    pre_activations: GateUp,
    update: LowRankUpdate | None,
    activation: str,
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """The gradient of every operand by its name; recomputes each block's pre-activation."""
    act, gate = get_activation(activation), pre_activations.gate
    dtype = compute_dtype(gate.dtype)
    grads = {"gate": torch.empty_like(grad_hidden), "up": torch.empty_like(grad_hidden)}
    if update is not None:
        grads["state"] = torch.empty_like(update.state)
        grads |= {"fold_gate": _zeros(update.gate, dtype), "fold_up": _zeros(update.up, dtype)}
    for span in blocks(gate):
        g, u = (cast_tensor(x, dtype) for x in updated(pre_activations, update, span))
        d = cast_tensor(grad_hidden[span], dtype)
        active, slope = act.with_derivative(g)
        d_gate, d_up = slope * d * u, d * active
        grads["gate"][span], grads["up"][span] = d_gate, d_up
        if update is not None:
            add_update_gradients(grads, d_gate, d_up, update, span)
    return grads


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(x.shape, dtype=dtype, device=x.device)
