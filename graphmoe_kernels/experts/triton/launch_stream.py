"""The expert round of many tokens, and every backward: plain steps over tiles of rows that share their experts.

H M^T by cuBLAS into a buffer, kernels that stream over it and P_1, and a small sum over the splits of F. Two small
kernels before them put rows with the same experts together and pad each tuple of experts to whole tiles. Grids follow
from the most tiles that there can be, so the host waits for nothing.

A row is a token with its one or two experts where there are few tuples of them, else a slot of a token (`tiling`). Of
two slots with enough tokens each has its own launches, and the second adds to what the first has written. Else the
hidden of all slots, and in backward the gradients of their pre-activations, go to a buffer and are summed after it.

Backward makes H M^T again, and runs two kernels: gradients of tokens are sums over F, those of experts sums over
tokens. One kernel for both would write and read what each stripe of columns adds to the gradients of the low-rank
activations, 0.47 GB for 8192 tokens of Llama-3-8B in stripes of 128, and hold the sums of a stripe's experts beside a
tile; the second kernel reads 0.7 GB more (1.2 GB in a later round), at twice the occupancy.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton.gradients import (
    OF_EXPERTS,
    TokenGradients,
    empty_token_gradients,
    no_weight_sums,
)
from graphmoe_kernels.experts.triton.layout import RowStrides
from graphmoe_kernels.experts.triton.placing import place, positions
from graphmoe_kernels.experts.triton.sizes import Sizes, Tiling, compact_columns, padded_rank
from graphmoe_kernels.experts.triton.stream_plan import Piece, StreamPlan, stream_plan
from graphmoe_kernels.launching import SMALLEST_TILE, launch

# Tokens of a program that sums the splits.
SUMMING = {"BLOCK_M": SMALLEST_TILE, "num_warps": 4}


class StreamSums(NamedTuple):
    """What the backward to tokens leaves to other kernels, by position, a tile's experts as they rise.

    Attributes:
        gate, up: [splits, positions, columns] fp32, what each split adds to the gradients of the low-rank activations.
        routing_weights: [splits, positions, experts of a tile] fp32, likewise.
        rows: [positions, experts of a tile, 3, padded rank], A x of an expert for gate and up, and its gradient of
            low_down.
    """

    gate: Tensor
    up: Tensor
    routing_weights: Tensor
    rows: Tensor


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, imported by the first call, as Triton may be missing where nothing runs on it."""
    from graphmoe_kernels.experts.triton.stream import experts_stream
    from graphmoe_kernels.experts.triton.stream_backward_tokens import experts_stream_backward_tokens
    from graphmoe_kernels.experts.triton.stream_backward_weights import experts_stream_backward_weights
    from graphmoe_kernels.experts.triton.stream_sums import experts_stream_sum, experts_stream_sum_tokens

    return SimpleNamespace(
        stream=experts_stream,
        summing=experts_stream_sum,
        backward_tokens=experts_stream_backward_tokens,
        summing_tokens=experts_stream_sum_tokens,
        backward_weights=experts_stream_backward_weights,
    )


def forward(
    operands: ExpertOperands, strides: RowStrides, size: Sizes, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r]; the operands are laid out."""
    gate, kernels, n = operands.pre_activations.gate, _kernels(), size.num_experts
    plan = stream_plan("stream", operands, size, activation)
    own, block = plan.tiling, plan.constants["BLOCK_M"]
    placed = place(operands.expert_ids, operands.routing_weights, size, own, block)
    num_positions, tiles = len(placed.rows), positions(size, own, block) // block
    streamed, added = _streamed(operands), _fold_buffer(operands.update, size, plan)
    hidden, low_down = gate.new_empty((size.tokens, size.width)), gate.new_empty((size.tokens, n * size.rank))
    columns = compact_columns(own.experts, size.rank)
    partial = gate.new_empty((plan.splits, num_positions, columns), dtype=torch.float32)
    (of_rows,) = _row_buffers(gate, size, plan, 1)
    for piece in plan.pieces:
        _fold_product(added, operands.update, piece, size)
        out = _rows_of(hidden, of_rows, piece, size)
        for part in piece.launches(own.launches):
            launch(
                kernels.stream, (tiles, piece.splits), streamed, strides, placed, added, _row_stride(added),
                part, out, out.stride(0), partial, num_positions, size.width, n, scale, device=gate.device,
                **plan.constants,
            )  # fmt: skip
        _sum_rows(hidden, of_rows, piece, size)
    launch(
        kernels.summing, (math.ceil(size.tokens / SUMMING["BLOCK_M"]),), partial, operands.expert_ids, placed.places,
        low_down, size.tokens, num_positions, plan.splits, n, device=gate.device, **_summing(size, own),
    )  # fmt: skip
    return hidden, low_down


def backward(
    grads: tuple[Tensor, Tensor],
    operands: ExpertOperands,
    strides: RowStrides,
    size: Sizes,
    scale: float,
    activation: str,
    needed: frozenset[str],
) -> tuple[TokenGradients, dict[str, Tensor]]:
    """The gradients of tokens, and by name those of experts where any is ``needed``; the operands are laid out."""
    gate, kernels, n = operands.pre_activations.gate, _kernels(), size.num_experts
    if size.tokens == 0:
        return empty_token_gradients(gate, size), no_weight_sums(gate, size, 1, operands.scales is not None).total()
    plan = stream_plan("stream_backward_tokens", operands, size, activation)
    own, block = plan.tiling, plan.constants["BLOCK_M"]
    placed = place(operands.expert_ids, operands.routing_weights, size, own, block)
    num_positions, tiles = len(placed.rows), positions(size, own, block) // block
    streamed, added = _streamed(operands), _fold_buffer(operands.update, size, plan)
    found = empty_token_gradients(gate, size)
    partial = _no_stream_sums(gate, size, plan, num_positions)
    experts = stream_plan("stream_backward_weights", operands, size, activation)
    fixed = experts.constants | {"TILE": block}
    wanted = bool(needed & OF_EXPERTS)
    splits = 1 if fixed["SHARED"] else experts.splits
    sums = no_weight_sums(gate, size, splits, operands.scales is not None) if wanted else None
    of_rows = _row_buffers(gate, size, plan, 2)
    for piece in plan.pieces:
        _fold_product(added, operands.update, piece, size)
        out = GateUp(*(_rows_of(x, rows, piece, size) for x, rows in zip(found[:2], of_rows, strict=True)))
        for part in piece.launches(own.launches):
            launch(
                kernels.backward_tokens, (tiles, piece.splits), streamed, strides, placed, added, _row_stride(added),
                part, grads, out, out.gate.stride(0), partial, num_positions, size.width, n, scale,
                device=gate.device, **plan.constants,
            )  # fmt: skip
        for x, rows in zip(found[:2], of_rows, strict=True):
            _sum_rows(x, rows, piece, size)
        if sums is not None:
            columns = piece.columns(size.width)
            stripes = math.ceil((columns.stop - columns.start) / fixed["BLOCK_F"])
            for part in piece.launches(own.launches):
                launch(
                    kernels.backward_weights, (stripes, experts.splits), streamed, strides, placed, added,
                    _row_stride(added), part, grads[0], partial.rows, sums, size.width, n, scale,
                    device=gate.device, **fixed,
                )  # fmt: skip
    launch(
        kernels.summing_tokens, (math.ceil(size.tokens / SUMMING["BLOCK_M"]),), partial, operands.expert_ids,
        placed.places, found.low, found.routing_weights, size.tokens, num_positions, plan.splits, n, scale,
        device=gate.device, **_summing(size, own),
    )  # fmt: skip
    return found, {} if sums is None else sums.total()


def _no_stream_sums(gate: Tensor, size: Sizes, plan: StreamPlan, num_positions: int) -> StreamSums:
    """Uninitialised, on the device of ``gate``."""
    experts = plan.tiling.experts
    columns = compact_columns(experts, size.rank)
    shapes = [(plan.splits, num_positions, c) for c in (columns, columns, experts)]
    rows = gate.new_empty((num_positions, experts, 3, padded_rank(size.rank)))
    of_gate, of_up, of_weights = (gate.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return StreamSums(of_gate, of_up, of_weights, rows)


def _summing(size: Sizes, tiling: Tiling) -> dict[str, int]:
    """The constants of the kernels that sum splits."""
    return {"SLOTS": size.slots, "EXPERTS": tiling.experts, "RANK": size.rank, **SUMMING}


def _streamed(operands: ExpertOperands) -> ExpertOperands:
    """The operands that the kernels of a stream read themselves: H M^T is made by cuBLAS."""
    return operands._replace(update=None)


def _piece_columns(size: Sizes, plan: StreamPlan) -> int:
    """Columns of the widest piece, the first."""
    return plan.pieces[0].columns(size.width).stop


def _row_stride(added: GateUp | None) -> int:
    return 0 if added is None else added.gate.stride(0)


def _fold_buffer(update: LowRankUpdate | None, size: Sizes, plan: StreamPlan) -> GateUp | None:
    """Where H M^T of a piece's columns goes, [N, columns] each."""
    if update is None:
        return None
    return GateUp(*update.state.new_empty((2, size.tokens, _piece_columns(size, plan))).unbind())


def _fold_product(added: GateUp | None, update: LowRankUpdate | None, piece: Piece, size: Sizes) -> None:
    """Write H M^T of a piece's columns to ``added``, [N, columns] each."""
    if added is None or update is None:
        return
    for out, fold in zip(added, (update.gate, update.up), strict=True):
        rows = fold[piece.columns(size.width)]  # [columns, G]
        torch.mm(update.state, rows.T, out=out[:, : len(rows)])


def _row_buffers(gate: Tensor, size: Sizes, plan: StreamPlan, count: int) -> list[Tensor | None]:
    """Where the rows of a token's slots go, [N * k, a piece's columns] each; None where a launch has one of a token."""
    if plan.tiling.rows_together == 1:
        return [None] * count
    rows = size.tokens * plan.tiling.rows
    return list(gate.new_empty((count, rows, _piece_columns(size, plan))).unbind())


def _rows_of(x: Tensor, of_rows: Tensor | None, piece: Piece, size: Sizes) -> Tensor:
    """Where a launch writes its rows: a piece's columns of x [N, F], or the buffer."""
    return x[:, piece.columns(size.width)] if of_rows is None else of_rows


def _sum_rows(x: Tensor, of_rows: Tensor | None, piece: Piece, size: Sizes) -> None:
    """Write the sums over tokens' rows to a piece's columns of x [N, F]."""
    if of_rows is not None:
        out = x[:, piece.columns(size.width)]
        torch.sum(of_rows.view(size.tokens, -1, of_rows.shape[1])[:, :, : out.shape[1]], 1, out=out)
