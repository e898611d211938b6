"""The backward of a streamed expert round to what belongs to experts: their B, A_D and scale vectors."""

from __future__ import annotations

import triton
import triton.language as tl

from graphmoe_kernels.experts.triton.stream_tile import (
    STREAM_BLOCK,
    load_base,
    placed_rows,
    placed_slot,
    scale_tile,
    slot_backward,
    slot_d_z,
    slot_low_rows,
)
from graphmoe_kernels.experts.triton.tile import padded_rank


@triton.jit
def no_sums(scales, RANK: tl.constexpr, BLOCK_F: tl.constexpr):
    """Zeros: of gate_B, up_B and down_A [BLOCK_F, padded rank] and, with scale vectors, of those [BLOCK_F]."""
    zero = tl.zeros([BLOCK_F, padded_rank(RANK)], tl.float32)
    vector = zero
    if scales is not None:
        vector = tl.zeros([BLOCK_F], tl.float32)
    return zero, zero, zero, vector, vector


@triton.jit
def add_to(out, x, e, f, width, num_experts, RANK: tl.constexpr):
    """Add x [BLOCK_F, padded rank] to columns f of expert e in ``out`` [n, F, r] fp32, unless e is none."""
    i = tl.arange(0, padded_rank(RANK))
    inside = (f < width)[:, None] & (i < RANK)[None, :] & (e < num_experts)
    at = out + e.to(tl.int64) * width * RANK + f[:, None] * RANK + i[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)


@triton.jit
def add_vector_to(out, x, e, f, width, num_experts):
    """Add x [BLOCK_F] to columns f of expert e in ``out`` [n, F] fp32."""
    at = out + e.to(tl.int64) * width + f
    inside = (f < width) & (e < num_experts)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)


@triton.jit
def flush(sums, own, slot, e, f, width, num_experts, scale, RANK: tl.constexpr):
    """Add one slot's sums to those of its expert e, from ``own`` [BLOCK..] on."""
    gate_B, up_B, down_A, of_gate, of_up = slot
    add_to(sums.gate_B + own * RANK, gate_B * scale, e, f, width, num_experts, RANK)
    add_to(sums.up_B + own * RANK, up_B * scale, e, f, width, num_experts, RANK)
    add_to(sums.down_A + own * RANK, down_A, e, f, width, num_experts, RANK)
    if sums.scales is not None:
        add_vector_to(sums.scales.gate + own, of_gate, e, f, width, num_experts)
        add_vector_to(sums.scales.up + own, of_up, e, f, width, num_experts)


@triton.jit
def add_slot(
    slot,
    g,
    u,
    d,
    operands,
    strides,
    d_low_down,
    token,
    live,
    e,
    w,
    f0,
    width,
    num_experts,
    scale,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One slot's sums plus those of a tile: d_g and d_u times A x, and what A_D read times d_low_down."""
    gate_B, up_B, down_A, of_gate, of_up = slot
    e = tl.minimum(e, num_experts - 1)
    low_g, low_u = slot_low_rows(operands, strides, token, live, e, num_experts, RANK)
    d_z = slot_d_z(d_low_down, token, live, e, num_experts, RANK)
    d_g, d_u, g_pre, u_pre, read, _ = slot_backward(
        g, u, d, low_g, low_u, d_z, w, operands, e, token, f0, width, scale, RANK, ACTIVATION, BLOCK_F
    )
    if operands.scales is not None:
        of_gate += tl.sum(d_g * g_pre, axis=0)
        of_up += tl.sum(d_u * u_pre, axis=0)
        d_g, d_u = scale_tile(d_g, d_u, operands.scales, e, f0 + tl.arange(0, BLOCK_F), width)
    dtype = low_g.dtype
    gate_B = tl.dot(tl.trans(d_g.to(dtype)), low_g, gate_B, input_precision="ieee")
    up_B = tl.dot(tl.trans(d_u.to(dtype)), low_u, up_B, input_precision="ieee")
    d_z = (d_z.to(tl.float32) * w[:, None]).to(dtype)
    down_A = tl.dot(tl.trans(read.to(dtype)), d_z, down_A, input_precision="ieee")
    return gate_B, up_B, down_A, of_gate, of_up


@triton.jit(do_not_specialize=["piece"])
def experts_stream_backward_weights(
    operands,
    strides,
    placed,
    added,
    stride_added,
    piece,
    d_hidden,
    d_low_down,
    sums,
    width,
    num_experts,
    scale,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Program (one of the piece's blocks of columns, split of the placed tiles).

    Tiles of the same experts follow one another: their sums stay in registers and go to memory where the experts
    change. Each split has its own ``sums``, a `WeightSums`, zero before, so that the order of a sum is fixed.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    f0 = piece.first_block * STREAM_BLOCK + tl.program_id(0) * BLOCK_F
    f = f0 + tl.arange(0, BLOCK_F)
    own = split.to(tl.int64) * num_experts * width
    used = tl.load(placed.used)
    split_tiles = tl.cdiv(used, splits)
    first = split * split_tiles
    last0, _ = placed_slot(placed, tl.minimum(first, used - 1), 0, SLOTS, BLOCK_M)
    last1, _ = placed_slot(placed, tl.minimum(first, used - 1), SLOTS - 1, SLOTS, BLOCK_M)
    slot0 = no_sums(operands.scales, RANK, BLOCK_F)
    slot1 = no_sums(operands.scales, RANK, BLOCK_F)
    for tile in range(first, min(first + split_tiles, used)):
        token, live = placed_rows(placed, tile, BLOCK_M)
        e0, w0 = placed_slot(placed, tile, 0, SLOTS, BLOCK_M)
        e1, w1 = placed_slot(placed, tile, SLOTS - 1, SLOTS, BLOCK_M)
        if (e0 != last0) | (e1 != last1):
            flush(sums, own, slot0, last0, f, width, num_experts, scale, RANK)
            slot0 = no_sums(operands.scales, RANK, BLOCK_F)
            if SLOTS == 2:
                tl.debug_barrier()  # the next sums may be of the same expert, and read by other threads
                flush(sums, own, slot1, last1, f, width, num_experts, scale, RANK)
                slot1 = no_sums(operands.scales, RANK, BLOCK_F)
            tl.debug_barrier()
            last0, last1 = e0, e1
        g, u = load_base(operands, strides, added, stride_added, piece, token, live, f, width)
        at = token[:, None] * width + f[None, :]
        d = tl.load(d_hidden + at, mask=live[:, None] & (f < width)[None, :], other=0.0).to(tl.float32)
        slot0 = add_slot(
            slot0,
            g,
            u,
            d,
            operands,
            strides,
            d_low_down,
            token,
            live,
            e0,
            w0,
            f0,
            width,
            num_experts,
            scale,
            RANK,
            ACTIVATION,
            BLOCK_F,
        )
        if SLOTS == 2:
            slot1 = add_slot(
                slot1,
                g,
                u,
                d,
                operands,
                strides,
                d_low_down,
                token,
                live,
                e1,
                w1,
                f0,
                width,
                num_experts,
                scale,
                RANK,
                ACTIVATION,
                BLOCK_F,
            )
    flush(sums, own, slot0, last0, f, width, num_experts, scale, RANK)
    if SLOTS == 2:
        tl.debug_barrier()
        flush(sums, own, slot1, last1, f, width, num_experts, scale, RANK)
