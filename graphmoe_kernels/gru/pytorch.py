"""The GRU step as it runs on PyTorch: both gates side by side, and few calls, which are what few tokens wait for."""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.structures import cast_tensor


def step(
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
) -> Tensor:
    """Return h' beside H', [N, 2G]; see `graphmoe_kernels.gru_step`, which validates the arguments."""
    dtype, width = inputs.dtype, candidate_bias.shape[0]
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    squash = torch.sigmoid_ if candidate_activation == "sigmoid" else torch.tanh_
    inputs, candidate_bias = cast_tensor(inputs, compute), cast_tensor(candidate_bias, compute)
    if recurrent is None or state is None or total is None:  # h = 0: nothing for the reset gate to act on
        update, _, candidate = torch.split_with_sizes(inputs, (width, width, width), 1)  # [N, G] each
        new = cast_tensor(torch.sigmoid(update) * squash(candidate + candidate_bias), dtype)
        return torch.cat((new, new), 1)

    gates, candidate = torch.split_with_sizes(inputs, (2 * width, width), 1)  # [N, 2G], [N, G]
    z, q = torch.split_with_sizes(torch.sigmoid(gates + recurrent), (width, width), 1)  # [N, G] each
    h = cast_tensor(state, compute)
    reset = cast_tensor(q * h, dtype)
    if dtype is compute:
        candidate = torch.addmm(candidate, reset, candidate_weight.t())
    else:
        candidate = candidate + torch.mm(reset, candidate_weight.t())
    new = torch.lerp(h, squash(candidate + candidate_bias), z)  # (1 - z) h + z c
    return cast_tensor(torch.cat((new, new + total), 1), dtype)
