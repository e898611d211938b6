"""One slot's backward inside a tile, shared by the two backward kernels: nothing wide was saved, all is recomputed."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton_tile import (
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
    g_base, u_base, d_c, d_z, low, low_update, gate_B, up_B, down_A, gate_scale, up_scale, gate_bias, up_bias, weights,
    listed, ids, chosen, token, live, f, f0, width, num_experts, stride_low, stride_update, seed, scale, threshold,
    kept,
    SLOTS: tl.constexpr, SLOTS_PADDED: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Recompute a slot and differentiate it.

    Returns the gradients of the scaled pre-activations, the pre-activations before their scale vectors, act(g) * u as
    the down branch reads it (after dropout), and the routing weights' gradient from these columns; [BLOCK_M, BLOCK_F]
    fp32, the last [BLOCK_M].
    """
    g_pre, u_pre = slot_pre_activation(
        g_base, u_base, low, low_update, gate_B, up_B, listed, chosen, token, f, width, num_experts, stride_low,
        stride_update, scale, HAS_UPDATE, RANK, RANK_PADDED,
    )
    g, u = scale_and_shift(
        g_pre, u_pre, gate_scale, up_scale, gate_bias, up_bias, listed, chosen, f, width, HAS_SCALE, HAS_BIAS
    )
    active = activate(g, ACTIVATION)
    hidden = active * u

    d_hidden = tl.zeros_like(g)
    whole = num_experts * RANK
    for i in range(tl.load(listed) if RANK > 0 else 0):
        e = tl.load(listed + 1 + i)
        rows = low_rank_rows(d_z, d_z, token, chosen == e, e * RANK, whole, 0, False, RANK, RANK_PADDED)
        a = expert_rows(down_A, e, f, width, RANK, RANK_PADDED)
        d_hidden = tl.dot(rows, a, d_hidden, input_precision="ieee")
    read = hidden
    if DROPOUT:
        keep = keep_mask(tl.load(seed), token, chosen, f0, threshold, BLOCK_F)
        d_hidden = tl.where(keep, d_hidden * kept, 0.0)
        read = tl.where(keep, hidden * kept, 0.0)
    d_hidden += d_c
    d_weight = tl.sum(hidden * d_hidden, axis=1)
    w = expert_weights(weights, ids, chosen, token, live, num_experts, SLOTS, SLOTS_PADDED)
    d_hidden *= w[:, None]
    return d_hidden * u * differentiate(g, ACTIVATION), d_hidden * active, g_pre, u_pre, read, d_weight
