"""The expert SwiGLU round on PyTorch for few (token, slot) pairs, as decoding has them, in few calls.

One token is multiplied with its experts' matrices where they lie. Of several tokens each pair's matrices are gathered
and multiplied as a batch: up to some size, copying them costs less than the calls that this saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts.dropout import DrawnMask, kept_scale
from graphmoe_kernels.experts.ids import read_ids
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp
from graphmoe_kernels.experts.pytorch_blocks import compute_dtype, on_host, updated
from graphmoe_kernels.structures import cast_tensor

# Up to so many pairs, and bytes of all pairs' matrices of one projection, gathering is the quicker way. Measured on one
# core, r = 16: twice as quick or more up to a third of these bytes, level at all of them; with F = 128 more than that
# for 128 pairs too. One token with two experts takes a quarter (F = 128) to half (F = 14336) of the time.
MOST_PAIRS = 128
GATHERED_BYTES = 2**22


def suits(operands: ExpertOperands) -> bool:
    """Tell whether a call is quicker as here than with the pairs of an expert at a time."""
    (tokens, slots), (_, rank, width) = operands.expert_ids.shape, operands.down_A.shape
    if not 0 < tokens * slots <= MOST_PAIRS or not on_host(operands.low):
        return False
    element = compute_dtype(operands.low.dtype).itemsize
    return tokens == 1 or tokens * slots * rank * width * element <= GATHERED_BYTES


def forward(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """Return hidden [N, F] and low_down [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    out, dtype = operands.low.dtype, compute_dtype(operands.low.dtype)
    ids = read_ids(operands.expert_ids, operands.down_A.shape[0])
    low = operands.low if operands.low_update is None else operands.low + operands.low_update
    gate, up = updated(operands.pre_activations, operands.update)
    mask = None
    if operands.dropout is not None:
        mask = DrawnMask(*operands.dropout).draw(gate.new_empty(gate.shape, dtype=dtype))
        mask = mask.mul_(kept_scale(operands.dropout.rate))[:, None]  # [N, 1, F]
    low, base = cast_tensor(low, dtype), GateUp(cast_tensor(gate, dtype), cast_tensor(up, dtype))
    if len(ids) == 1:
        hidden, low_down = _one_token(operands, ids[0], base, low, mask, scale, activation)
    else:
        hidden, low_down = _gathered(operands, base, low, mask, scale, activation)
    return cast_tensor(hidden, out), cast_tensor(low_down, out)


def _one_token(
    operands: ExpertOperands,
    ids: list[int],
    base: GateUp,
    low: Tensor,
    mask: Tensor | None,
    scale: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Take the experts of the one token in turn; ``base`` and ``low`` with a later round's updates in them."""
    act, dtype = get_activation(activation).function, low.dtype
    n, rank, width = operands.down_A.shape
    low = low.reshape(2 * n, 1, rank)
    gate_B, up_B, down_A = operands.B.gate.mT, operands.B.up.mT, operands.down_A.mT
    hidden, low_down = low.new_zeros(1, width), low.new_zeros(n, 1, rank)
    for e, weight in zip(ids, operands.routing_weights.tolist()[0], strict=True):
        g = torch.addmm(base.gate, low[e], cast_tensor(gate_B[e], dtype), alpha=scale)  # [1, F]
        u = torch.addmm(base.up, low[n + e], cast_tensor(up_B[e], dtype), alpha=scale)
        if operands.scales is not None:
            g.mul_(operands.scales.gate[e])
            u.mul_(operands.scales.up[e])
        if operands.biases is not None:
            g.add_(operands.biases.gate)
            u.add_(operands.biases.up)
        own = act(g).mul_(u)
        low_down[e].addmm_(own if mask is None else own * mask[0], cast_tensor(down_A[e], dtype), alpha=weight)
        hidden.add_(own, alpha=weight)
    return hidden, low_down.view(1, n * rank)


def _gathered(
    operands: ExpertOperands, base: GateUp, low: Tensor, mask: Tensor | None, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    """Take all pairs at once, a projection at a time; arguments as in `_one_token`."""
    ids = cast_tensor(operands.expert_ids, torch.int64)
    (tokens, slots), (n, rank, _) = ids.shape, operands.down_A.shape
    entries = ids[:, :, None].expand(2, tokens, slots, rank)
    low = low.reshape(tokens, 2, n, rank).transpose(0, 1).gather(2, entries)  # [2, N, k, r]
    g = torch.add(base.gate[:, None], _product(low[0], operands.B.gate.mT, ids), alpha=scale)  # [N, k, F]
    u = torch.add(base.up[:, None], _product(low[1], operands.B.up.mT, ids), alpha=scale)
    if operands.scales is not None:
        g.mul_(operands.scales.gate[ids])
        u.mul_(operands.scales.up[ids])
    if operands.biases is not None:
        g.add_(operands.biases.gate)
        u.add_(operands.biases.up)
    own = get_activation(activation).function(g).mul_(u).mul_(operands.routing_weights[:, :, None])
    hidden = own.sum(1)
    dropped = own if mask is None else own * mask
    narrow = _product(dropped, operands.down_A.mT, ids)  # [N, k, r]
    low_down = low.new_zeros(tokens, n, rank).scatter_(1, entries[0], narrow)
    return hidden, low_down.view(tokens, n * rank)


def _product(x: Tensor, matrices: Tensor, ids: Tensor) -> Tensor:
    """Return the product of every pair's x [N, k, K] and its expert's matrix, of [n, K, M]: [N, k, M].

    The copied matrices are let go before the next ones are made, which then lie in the same memory.
    """
    own = cast_tensor(matrices.mT.index_select(0, ids.reshape(-1)), x.dtype).mT  # [p, K, M]
    return torch.bmm(x.reshape(own.shape[0], 1, own.shape[1]), own).view(*ids.shape, own.shape[2])
