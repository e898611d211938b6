"""The GRU step of self-rethinking (GraphMoE, Eq. 5 and 6), in plain PyTorch: the oracle and the CPU path.

The products with the wide expert output happen outside; what is left is three [N, G] x [G, G] products and pointwise
work, which plain PyTorch does in a few calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def step(
    inputs: Tensor,
    state: Tensor | None,
    recurrent_gates: Tensor,
    recurrent_candidate: Tensor,
    candidate_bias: Tensor,
    candidate_activation: str,
) -> Tensor:
    """See `graphmoe_kernels.gru_step` for the contract; arguments are validated there."""
    compute = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    squash = torch.sigmoid if candidate_activation == "sigmoid" else torch.tanh
    width = candidate_bias.shape[0]
    update, reset, candidate = inputs.to(compute).split(width, dim=-1)  # [N, G] each
    bias = candidate_bias.to(compute)
    if state is None:  # h = 0: the recurrent products vanish and the reset gate has nothing to act on
        return (torch.sigmoid(update) * squash(candidate + bias)).to(inputs.dtype)

    gates = F.linear(state, recurrent_gates).to(compute)  # [N, 2G]
    z = torch.sigmoid(update + gates[:, :width])
    q = torch.sigmoid(reset + gates[:, width:])
    h = state.to(compute)
    c = squash(candidate + F.linear((q * h).to(state.dtype), recurrent_candidate).to(compute) + bias)
    return ((1 - z) * h + z * c).to(inputs.dtype)
