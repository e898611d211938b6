"""The expert SwiGLU round in plain PyTorch, slot by slot: the oracle of `graphmoe_kernels.expert_swiglu`.

Differentiable by autograd, any float dtype, no grouping: every slot gathers its expert's weights for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation


def dropout_generator(seed: Tensor) -> torch.Generator:
    """The stream of random draws that ``seed`` (one int64) stands for; always on the CPU, so equal on every device."""
    return torch.Generator().manual_seed(int(seed))


def draw_dropout_mask(generator: torch.Generator, probability: float, shape: tuple[int, int, int]) -> Tensor:
    """The next tokens' mask, [tokens, k, F] with entries 0 or 1 / (1 - probability), fp32.

    The draws are one stream in token order: cutting a batch into blocks does not change what a token gets.
    """
    keep = torch.rand(shape, generator=generator) >= probability
    return keep.to(torch.float32).div_(1 - probability)


def expert_swiglu(
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    fold_gate: Tensor | None,
    fold_up: Tensor | None,
    low_gate: Tensor,
    low_up: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    weights: Tensor,
    experts: Tensor,
    scale: float,
    activation: str,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `graphmoe_kernels.expert_swiglu` for the contract; arguments are validated there."""
    n, _, r = gate_B.shape
    tokens, slots = experts.shape
    act = get_activation(activation).function
    if state is not None and fold_gate is not None and fold_up is not None:
        gate = gate + state @ fold_gate.T  # [N, F]
        up = up + state @ fold_up.T
    low_gate = low_gate.view(tokens, n, r)
    low_up = low_up.view(tokens, n, r)
    mask = None
    if dropout > 0 and seed is not None:
        shape = (tokens, slots, gate.shape[1])
        mask = draw_dropout_mask(dropout_generator(seed), dropout, shape).to(gate.device, gate.dtype)

    c = torch.zeros_like(gate)
    z = low_gate.new_zeros(tokens, n, r)
    rows = torch.arange(tokens, device=experts.device)
    for slot in range(slots):
        e = experts[:, slot]  # [N]
        w = weights[:, slot, None].to(gate.dtype)  # [N, 1]
        g = gate + scale * torch.einsum("nfr,nr->nf", gate_B[e], low_gate[rows, e])
        u = up + scale * torch.einsum("nfr,nr->nf", up_B[e], low_up[rows, e])
        hidden = act(g) * u  # [N, F]
        c = c + w * hidden
        dropped = hidden if mask is None else hidden * mask[:, slot]
        z = z.index_put((rows, e), w * torch.einsum("nrf,nf->nr", down_A[e], dropped))
    return c, z.view(tokens, n * r)
