"""The expert SwiGLU round in plain PyTorch, slot by slot: the oracle of `graphmoe_kernels.expert_swiglu`.

Differentiable by autograd, any float dtype, no grouping: every slot gathers its expert's weights for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts.dropout import dropout_mask, kept_scale
from graphmoe_kernels.experts.ids import check_ids
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp, LowRankUpdate


def expert_swiglu(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """See `graphmoe_kernels.expert_swiglu` for the contract; arguments are validated there."""
    ids, s = operands.expert_ids, scale
    n, r, width = operands.down_A.shape
    tokens, slots = ids.shape
    ids = ids.long()  # bytes would index as a mask
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would be a sync
        check_ids(ids, n)
    act = get_activation(activation).function
    gate, up = _updated(operands.pre_activations, operands.update)  # [N, F] each
    low = operands.low if operands.low_update is None else operands.low + operands.low_update
    low_gate, low_up = low.view(tokens, 2, n, r).unbind(1)  # [N, n, r] each
    mask = None
    if operands.dropout is not None:
        rate, seed = operands.dropout
        mask = dropout_mask(seed.to(gate.device), rate, ids, width).to(gate.dtype) * kept_scale(rate)  # [N, k, F]

    hidden = torch.zeros_like(gate)
    low_down = low.new_zeros(tokens, n, r)
    rows = torch.arange(tokens, device=ids.device)
    for slot in range(slots):
        e = ids[:, slot]  # [N]
        w = operands.routing_weights[:, slot, None].to(gate.dtype)  # [N, 1]
        g = gate + s * torch.einsum("nfr,nr->nf", operands.B.gate[e], low_gate[rows, e])
        u = up + s * torch.einsum("nfr,nr->nf", operands.B.up[e], low_up[rows, e])
        if operands.scales is not None:  # which may be in a wider dtype
            g, u = (g * operands.scales.gate[e]).to(g.dtype), (u * operands.scales.up[e]).to(u.dtype)
        if operands.biases is not None:
            g, u = g + operands.biases.gate, u + operands.biases.up
        own = act(g) * u  # [N, F]
        hidden = hidden + w * own
        dropped = own if mask is None else own * mask[:, slot]
        low_down = low_down.index_put((rows, e), w * torch.einsum("nrf,nf->nr", operands.down_A[e], dropped))
    return hidden, low_down.view(tokens, n * r)


def swiglu(pre_activations: GateUp, update: LowRankUpdate | None, activation: str) -> Tensor:
    """See `graphmoe_kernels.swiglu`."""
    g, u = _updated(pre_activations, update)
    return get_activation(activation).function(g) * u


def _updated(pre_activations: GateUp, update: LowRankUpdate | None) -> tuple[Tensor, Tensor]:
    gate, up = pre_activations
    if update is None:
        return gate, up
    return gate + update.state @ update.gate.T, up + update.state @ update.up.T
