"""The expert SwiGLU round in plain PyTorch, slot by slot: the oracle of `graphmoe_kernels.expert_swiglu`.

Differentiable by autograd, any float dtype, no grouping: every slot gathers its expert's weights for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts.dropout import dropout_mask
from graphmoe_kernels.experts.ids import expert_bounds
from graphmoe_kernels.experts.operands import Inputs, Settings


def expert_swiglu(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """See `graphmoe_kernels.expert_swiglu` for the contract; arguments are validated there."""
    gate, up, experts, s = inputs.gate, inputs.up, inputs.experts, settings.scale
    n, r, width = inputs.down_A.shape
    tokens, slots = experts.shape
    experts = experts.long()  # bytes would index as a mask
    if experts.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would be a sync
        expert_bounds(experts.flatten().sort().values, experts, n)
    act = get_activation(settings.activation).function
    low = inputs.low
    if inputs.update is not None:
        state, fold_gate, fold_up = inputs.update
        gate = gate + state @ fold_gate.T  # [N, F]
        up = up + state @ fold_up.T
    if inputs.low_update is not None:
        low = low + inputs.low_update
    low_gate, low_up = low.view(tokens, 2, n, r).unbind(1)  # [N, n, r] each
    mask = None
    if settings.dropout > 0 and settings.seed is not None:
        mask = dropout_mask(settings.seed.to(gate.device), settings.dropout, 0, experts, width)

    c = torch.zeros_like(gate)
    z = low.new_zeros(tokens, n, r)
    rows = torch.arange(tokens, device=experts.device)
    for slot in range(slots):
        e = experts[:, slot]  # [N]
        w = inputs.weights[:, slot, None].to(gate.dtype)  # [N, 1]
        g = gate + s * torch.einsum("nfr,nr->nf", inputs.gate_B[e], low_gate[rows, e])
        u = up + s * torch.einsum("nfr,nr->nf", inputs.up_B[e], low_up[rows, e])
        if inputs.scales is not None:
            g, u = (g * inputs.scales[0][e]).to(g.dtype), (u * inputs.scales[1][e]).to(u.dtype)  # scales may be wider
        if settings.biases is not None:
            g, u = g + settings.biases[0], u + settings.biases[1]
        hidden = act(g) * u  # [N, F]
        c = c + w * hidden
        dropped = hidden if mask is None else hidden * mask[:, slot].to(hidden.dtype)
        z = z.index_put((rows, e), w * torch.einsum("nrf,nf->nr", inputs.down_A[e], dropped))
    return c, z.view(tokens, n * r)
