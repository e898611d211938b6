"""The expert SwiGLU round on PyTorch for few (token, slot) pairs, as decoding has them: all pairs in a dozen calls.

Each pair's matrices are gathered and multiplied as a batch, in place of an expert at a time with its rows picked and
put back. Up to some size, copying them costs less than the calls that this saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.experts.dropout import dropout_mask
from graphmoe_kernels.experts.ids import check_ids
from graphmoe_kernels.experts.operands import ExpertOperands
from graphmoe_kernels.experts.pytorch_blocks import compute_dtype

# Up to so many pairs, and bytes of all pairs' matrices, gathering is the quicker way. Measured on one core, r = 16 in
# fp32: with F = 128 for 16 pairs (3 times as quick), with F = 1536 for 8 (2.4 MB) and not for 16, with F = 8192 for 1.
MOST_PAIRS = 16
GATHERED_BYTES = 5 * 2**19


def suits(operands: ExpertOperands) -> bool:
    """Tell whether a call's matrices are quicker gathered by pair than taken expert by expert."""
    pairs, (_, rank, width) = operands.expert_ids.numel(), operands.down_A.shape
    if not 0 < pairs <= MOST_PAIRS:
        return False
    return 3 * pairs * rank * width * operands.down_A.element_size() <= GATHERED_BYTES


def forward(operands: ExpertOperands, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """Return hidden [N, F] and low_down [N, n*r]; see `graphmoe_kernels.expert_swiglu`."""
    (gate, up), update = operands.pre_activations, operands.update
    if update is not None:
        gate = torch.addmm(gate, update.state, update.gate.t())  # [N, F]
        up = torch.addmm(up, update.state, update.up.t())
    ids, dtype = operands.expert_ids, compute_dtype(gate.dtype)
    n, rank, width = operands.down_A.shape
    tokens, slots = ids.shape
    check_ids(ids, n)
    pairs = tokens * slots
    wide_ids = ids.to(torch.int64)
    chosen = wide_ids.reshape(pairs)
    low = operands.low if operands.low_update is None else operands.low + operands.low_update
    at = wide_ids[:, None, :, None]  # [N, 1, k, 1]
    own = low.view(tokens, 2, n, rank).gather(2, at.expand(tokens, 2, slots, rank)).to(dtype)  # [N, 2, k, r]
    g, u = (
        _pre_activation(base, own[:, part], B.index_select(0, chosen).to(dtype), scale, slots)
        for part, (base, B) in enumerate(zip((gate, up), operands.B, strict=True))
    )  # [p, F] each
    if operands.scales is not None:
        g, u = (x.mul_(vector.index_select(0, chosen)) for x, vector in zip((g, u), operands.scales, strict=True))
    if operands.biases is not None:
        g, u = (x.add_(bias) for x, bias in zip((g, u), operands.biases, strict=True))
    hidden = get_activation(activation).function(g).mul_(u)  # [p, F]
    weights = operands.routing_weights.to(dtype)  # [N, k]
    combined = torch.bmm(weights[:, None], hidden.view(tokens, slots, width))  # [N, 1, F]
    if operands.dropout is not None:
        rate, seed = operands.dropout
        hidden = hidden * dropout_mask(seed.to(ids.device), rate, 0, ids, width).to(dtype).flatten(0, 1)
    A = operands.down_A.index_select(0, chosen).to(dtype)  # [p, r, F]
    narrow = torch.bmm(A, hidden[..., None]).view(tokens, slots, rank) * weights[..., None]
    low_down = low.new_zeros(tokens, n, rank)
    low_down.scatter_(1, at[:, 0].expand(tokens, slots, rank), narrow.to(low.dtype))
    return combined.view(tokens, width).to(gate.dtype), low_down.view(tokens, n * rank)


def _pre_activation(base: Tensor, low: Tensor, B: Tensor, scale: float, slots: int) -> Tensor:
    """base + s B (A x) of every pair, [p, F], for base [N, F], low [N, k, r] and each pair's B [p, F, r]."""
    pairs, width, rank = B.shape
    own = base.to(B.dtype)[:, None].expand(-1, slots, width).reshape(pairs, width, 1)
    return torch.baddbmm(own, B, low.reshape(pairs, rank, 1), alpha=scale).view(pairs, width)
