"""Random arguments of `gru_step`, and the equations that it is held to."""

from __future__ import annotations

import torch

WIDTH = 5


def arguments(tokens: int = 4, width: int = WIDTH, dtype: torch.dtype = torch.float64, state: bool = True) -> dict:
    """Random arguments of `gru_step`."""

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    return {
        "inputs": draw(tokens, 3 * width),
        "recurrent": draw(tokens, 2 * width) if state else None,
        "state": draw(tokens, width) if state else None,
        "total": draw(tokens, width) if state else None,
        "candidate_weight": draw(width, width),
        "candidate_bias": draw(width),
    }


def by_definition(inputs, recurrent, state, total, candidate_weight, candidate_bias, squash):
    """The paper's equations in the dtype of the arguments, with h = 0 and H = 0 in the first round."""
    width = candidate_bias.shape[0]
    h = inputs.new_zeros(inputs.shape[0], width) if state is None else state
    v_z, v_r = (h, h) if recurrent is None else recurrent.split(width, dim=1)
    u_z, u_r, u_o = inputs.split(width, dim=1)
    z = torch.sigmoid(u_z + v_z)
    q = torch.sigmoid(u_r + v_r)
    c = squash(u_o + (q * h) @ candidate_weight.T + candidate_bias)
    new = (1 - z) * h + z * c
    return torch.cat([new, new if total is None else total + new], dim=1)
