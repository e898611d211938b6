"""The GRU step of self-rethinking (GraphMoE, Eq. 5 and 6), in plain PyTorch: the oracle.

The products with the wide expert output and the gates' product with the state happen outside; what is left is one
[N, G] x [G, G] product and pointwise work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def step(
    inputs: Tensor,
    recurrent: Tensor | None,
    state: Tensor | None,
    total: Tensor | None,
    candidate_weight: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
) -> Tensor:
    """See `graphmoe_kernels.gru_step` for the contract; arguments are validated there."""
    compute = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    squash = torch.sigmoid if candidate_activation == "sigmoid" else torch.tanh
    width = candidate_bias.shape[0]
    update, reset, candidate = inputs.to(compute).split(width, dim=-1)  # [N, G] each
    bias = candidate_bias.to(compute)
    if recurrent is None or state is None or total is None:  # h = 0: nothing for the reset gate to act on
        new = (torch.sigmoid(update) * squash(candidate + bias)).to(inputs.dtype)
        return torch.cat([new, new], dim=1)

    gates, h = recurrent.to(compute), state.to(compute)
    z = torch.sigmoid(update + gates[:, :width])
    q = torch.sigmoid(reset + gates[:, width:])
    c = squash(candidate + F.linear((q * h).to(inputs.dtype), candidate_weight).to(compute) + bias)
    new = (1 - z) * h + z * c
    return torch.cat([new, total.to(compute) + new], dim=1).to(inputs.dtype)
