"""The GRU step as a layer calls it: nothing is checked or cast."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.gru import op, pytorch, reference
from graphmoe_kernels.gru.triton import launch
from graphmoe_kernels.registration import seen_from_outside


def run_gru_step(
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
    backend: str,
    *,
    unseen: bool = False,
) -> Tensor:
    """Return h' beside H', [N, 2G]: `graphmoe_kernels.gru_step` of arguments that are known to be right.

    All tensors are of the dtype of ``inputs`` but the bias, which has any that the backend computes in; ``backend`` is
    one of `resolve_backend`'s; autocast is off unless it is Triton. ``unseen``: it is known that nobody
    looks on (`graphmoe_kernels.registration.unseen`).
    """
    tensors = (inputs, recurrent, state, total, candidate_weight, candidate_bias)
    if backend != "triton":
        step = pytorch.step if backend == "torch" else reference.step
        return step(*tensors, candidate_activation)
    if unseen or not seen_from_outside(*tensors):
        return launch.step(*tensors, candidate_activation, False)[0]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return op.step(*tensors, candidate_activation, save)[0]
