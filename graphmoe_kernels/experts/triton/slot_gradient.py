"""One slot's backward inside a tile, shared by the two backward kernels: nothing wide was saved, all is recomputed."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.tile import (
    expert_rows,
    expert_weights,
    keep_mask,
    low_rank_rows,
    scale_and_shift,
    slot_pre_activation,
)
from graphmoe_kernels.triton_activations import activate, differentiate


@triton.jit
def slot_gradient(
    g_base, u_base, d_hidden, d_low_down, operands, strides, listed, ids, chosen, token, live, f0, width, num_experts,
    scale, SLOTS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_F: tl.constexpr,
):
    """Recompute a slot in the columns from f0 on and differentiate it; d_hidden is the tile's, [BLOCK_M, BLOCK_F].

    Returns the gradients of the scaled pre-activations, the pre-activations before their scale vectors, act(g) * u as
    the down branch reads it (after dropout), and the routing weights' gradient from these columns; [BLOCK_M, BLOCK_F]
    fp32, the last [BLOCK_M].
    """
    f = f0 + tl.arange(0, BLOCK_F)
    g_pre, u_pre = slot_pre_activation(
        g_base, u_base, operands, strides, listed, chosen, token, f, width, num_experts, scale, RANK
    )
    g, u = scale_and_shift(g_pre, u_pre, operands, listed, chosen, f, width)
    active = activate(g, ACTIVATION)
    own = active * u

    d_own = tl.zeros_like(g)
    whole = num_experts * RANK
    for i in range(tl.load(listed)):
        e = tl.load(listed + 1 + i)
        rows = low_rank_rows(d_low_down, None, token, chosen == e, e * RANK, whole, 0, RANK)
        a = expert_rows(operands.down_A, e, f, width, RANK)
        d_own = tl.dot(rows, a, d_own, input_precision="ieee")
    read = own
    if operands.dropout is not None:
        keep = keep_mask(operands.dropout, token, chosen, f0, BLOCK_F)
        d_own = tl.where(keep, d_own * operands.dropout.kept, 0.0)
        read = tl.where(keep, own * operands.dropout.kept, 0.0)
    d_own += d_hidden
    d_weight = tl.sum(own * d_own, axis=1)
    w = expert_weights(operands.routing_weights, ids, chosen, token, live, num_experts, SLOTS)
    d_own *= w[:, None]
    return d_own * u * differentiate(g, ACTIVATION), d_own * active, g_pre, u_pre, read, d_weight
