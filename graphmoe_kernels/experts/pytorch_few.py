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
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp
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
    ids, dtype = operands.expert_ids, compute_dtype(operands.low.dtype)
    n, rank, width = operands.down_A.shape
    tokens, slots = ids.shape
    check_ids(ids, n)
    chosen = _cast(ids.reshape(-1), torch.int64)  # [p], p = N k
    token, rows = None, chosen  # rows: where a pair's expert stands in [N * n, r]
    if tokens > 1:
        token = torch.arange(tokens, dtype=chosen.dtype, device=ids.device).repeat_interleave(slots)
        rows = chosen + n * token
    g, u = (
        _pre_activation(base, token, low.index_select(0, rows), B.index_select(0, chosen), scale, dtype)
        for base, low, B in zip(_bases(operands), _halves(operands, n), operands.B, strict=True)
    )  # [p, F] each
    if operands.scales is not None:
        g, u = (x.mul_(vector.index_select(0, chosen)) for x, vector in zip((g, u), operands.scales, strict=True))
    if operands.biases is not None:
        g, u = (x.add_(bias) for x, bias in zip((g, u), operands.biases, strict=True))
    hidden = get_activation(activation).function(g).mul_(u)  # [p, F]
    hidden.mul_(_cast(operands.routing_weights, dtype).reshape(-1, 1))
    combined = hidden.view(tokens, slots, width).sum(1)  # [N, F]
    if operands.dropout is not None:
        rate, seed = operands.dropout
        hidden = hidden * dropout_mask(seed.to(ids.device), rate, 0, ids, width).to(dtype).flatten(0, 1)
    A = _cast(operands.down_A.index_select(0, chosen), dtype)  # [p, r, F]
    narrow = torch.bmm(A, hidden.unsqueeze(2)).squeeze(2)  # [p, r]
    low_down = torch.zeros(tokens * n, rank, dtype=operands.low.dtype, device=ids.device)
    low_down.index_copy_(0, rows, _cast(narrow, low_down.dtype))
    return _cast(combined, operands.low.dtype), low_down.view(tokens, n * rank)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in ``dtype``; asked first, as a ``to`` that does nothing takes ten times as long."""
    return x if x.dtype is dtype else x.to(dtype)


def _bases(operands: ExpertOperands) -> GateUp:
    """Return the pre-activations with a later round's update in them, [N, F] each."""
    if operands.update is None:
        return operands.pre_activations
    (gate, up), (state, for_gate, for_up) = operands.pre_activations, operands.update
    return GateUp(torch.addmm(gate, state, for_gate.t()), torch.addmm(up, state, for_up.t()))


def _halves(operands: ExpertOperands, n: int) -> tuple[Tensor, Tensor]:
    """Return the low-rank activations of gate and of up, an expert's in a row: [N * n, r] each."""
    low = operands.low if operands.low_update is None else operands.low + operands.low_update
    rows, rank = len(low) * n, operands.down_A.shape[1]
    gate, up = low.chunk(2, dim=1) if rank else (low, low)
    return gate.reshape(rows, rank), up.reshape(rows, rank)


def _pre_activation(
    base: Tensor, token: Tensor | None, low: Tensor, B: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """Return base + s B (A x) of every pair, [p, F], for base [N, F], each pair's low [p, r] and B [p, F, r]."""
    own = base if token is None else base.index_select(0, token)
    return torch.baddbmm(
        _cast(own, dtype).unsqueeze(2), _cast(B, dtype), _cast(low, dtype).unsqueeze(2), alpha=scale
    ).squeeze(2)
