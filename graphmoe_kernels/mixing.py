"""Experts that are mixed inside a linear: y = W x + b + s sum_i p_i(x) B_i A_i x, with the linear's own router for p.

Side by side the experts are one LoRA pair of rank n*r, whose low-rank activations are multiplied with p. With DoRA
y = W x + b + sum_i p_i (DoRA_i(x) - W x), so that experts which change nothing yet leave y alone whatever p is.

Source: LoRAMoE, Eq. 4 (p is a softmax over all experts) and MoLA, Eq. 2 (over the top k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.routing import Routing


def mixing_weights(routing: Routing) -> Tensor:
    """[N, n]: the routing weights where a token's chosen experts stand, zero elsewhere."""
    dense = torch.zeros_like(routing.logits, dtype=routing.routing_weights.dtype)
    return dense.scatter(1, routing.expert_ids.long(), routing.routing_weights)


def side_by_side(B: Tensor) -> Tensor:
    """B [n, out, r] as one of rank n*r, [out, n*r]."""
    return B.permute(1, 0, 2).flatten(1)


def weighted(low: Tensor, mixing: Tensor) -> Tensor:
    """Low-rank activations [N, m*r], each expert's r times its weight of [N, m]."""
    return (low.unflatten(1, (mixing.shape[1], -1)) * mixing.to(low.dtype)[..., None]).flatten(1)


def mixed_change(mixing: Tensor, change: Tensor) -> Tensor:
    """sum_i p_i (m_i - 1), [N, out], for mixing weights [N, n] and DoRA's vectors, less 1: m - 1, [n, out]."""
    return F.linear(mixing, change.T.to(mixing.dtype))
