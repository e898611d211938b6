"""The expert round of many tokens, forward and backward: plain steps over tiles of tokens that share all experts.

H M^T by cuBLAS into a buffer, kernels that stream over it and P_1, and a small sum over the splits of F. Two small
kernels before them put tokens with the same experts together and pad each tuple of experts to whole tiles. Grids follow
from the most tiles that there can be, so the host waits for nothing.

Backward makes H M^T again, and runs two kernels: gradients of tokens are sums over F, those of experts sums over
tokens. One kernel for both would write and read what each stripe of columns adds to the gradients of the low-rank
activations, 0.47 GB for 8192 tokens of Llama-3-8B in stripes of 128, and hold the sums of a stripe's experts beside a
tile; the second kernel reads 0.7 GB more (1.2 GB in a later round), at twice the occupancy.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import interpreting, per_device
from graphmoe_kernels.experts.operands import ExpertOperands, GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton.gradients import (
    OF_EXPERTS,
    TokenGradients,
    empty_token_gradients,
    no_weight_sums,
)
from graphmoe_kernels.experts.triton.layout import RowStrides
from graphmoe_kernels.experts.triton.placing import place, positions, tuples
from graphmoe_kernels.experts.triton.plan import config, constants, target
from graphmoe_kernels.experts.triton.sizes import STREAM_BLOCK, Sizes, cut, padded_rank, padded_slots, program_slots
from graphmoe_kernels.launching import SKINNY_TOKENS, SMALLEST_TILE, Config, dtype_class, launch

# A tuple of experts needs so many tokens on average. It is padded by half a tile, of 32 in the forward, so that there
# are no more rows of padding than tokens (the backward's tiles are of 64; their padding reads and writes nothing wide).
# Measured on an H100 with 18 tokens per tuple and 75% padding: the forward is 2.3 times as fast as without.
TUPLE_TOKENS = 16
# The kernels that put tokens together hold a count of every tuple in registers.
MAX_TUPLES = 255
# Columns of a token's compact low-rank rows, with which the tile's loads fit in registers and shared memory.
MAX_STREAM_COLUMNS = 32
# H M^T is made in one piece up to this size; beyond, in two, so that it takes no more memory than hidden.
BUFFER_BYTES = 2**26
# Rows of a program that sums the splits.
SUMMING = {"BLOCK_M": SMALLEST_TILE, "num_warps": 4}


def suits(size: Sizes, dtype: torch.dtype) -> bool:
    """Whether a call runs as a stream: many tokens in half precision, each with one or two whole experts."""
    return (
        size.tokens > SKINNY_TOKENS
        and dtype_class(dtype) == "half"
        and size.slots <= 2
        and size.rank > 0
        and size.columns <= MAX_STREAM_COLUMNS
        and tuples(size) <= MAX_TUPLES
        and size.tokens > TUPLE_TOKENS * tuples(size)
    )


class Piece(NamedTuple):
    """Blocks of `STREAM_BLOCK` columns that one launch streams over, and how they are split among its programs."""

    first_block: int
    end_block: int
    split_blocks: int
    first_split: int

    @property
    def splits(self) -> int:
        """How many programs share the blocks of a tile."""
        return math.ceil((self.end_block - self.first_block) / self.split_blocks)

    @property
    def columns(self) -> int:
        """How many columns it has, in whole blocks."""
        return (self.end_block - self.first_block) * STREAM_BLOCK


class StreamPlan(NamedTuple):
    """How a kernel is launched that streams over F; see `graphmoe_kernels.experts.triton.plan`.

    Attributes:
        pieces: one for each launch, the first as wide as any.
        splits: of all pieces; of the backward to experts, of the tiles instead.
        constants: the kernel's.
    """

    pieces: tuple[Piece, ...]
    splits: int
    constants: dict[str, Any]


class Extras(NamedTuple):
    """What a call has that takes registers beside the round itself."""

    dropout: bool
    scales: bool


class StreamSums(NamedTuple):
    """What the backward to tokens leaves to other kernels, by position, slots by rising expert.

    Attributes:
        gate, up: [splits, positions, columns] fp32, what each split adds to the gradients of the low-rank activations.
        routing_weights: [splits, positions, padded slots] fp32, likewise.
        rows: [positions, k, 3, padded rank], A x of the slot's expert for gate and up, and the gradient of its z.
    """

    gate: Tensor
    up: Tensor
    routing_weights: Tensor
    rows: Tensor


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, imported by the first call, as Triton may be missing where nothing runs on it."""
    from graphmoe_kernels.experts.triton.stream import experts_stream, experts_stream_sum
    from graphmoe_kernels.experts.triton.stream_backward_tokens import (
        experts_stream_backward_tokens,
        experts_stream_sum_tokens,
    )
    from graphmoe_kernels.experts.triton.stream_backward_weights import experts_stream_backward_weights

    return SimpleNamespace(
        stream=experts_stream,
        summing=experts_stream_sum,
        backward_tokens=experts_stream_backward_tokens,
        summing_tokens=experts_stream_sum_tokens,
        backward_weights=experts_stream_backward_weights,
    )


@per_device
def stream_plan(
    kernel: str, size: Sizes, activation: str, dtype: torch.dtype, device: torch.device, extras: Extras, pieces: int
) -> StreamPlan:
    """The plan of a call that `suits`, with F in so many pieces."""
    device_class, multiprocessors = target(device)
    chosen = fitting(config(kernel, size, dtype, device_class), extras)
    fixed = constants(size, activation, chosen)
    if kernel == "stream":
        fixed["APPROXIMATE"] = not interpreting()
    else:
        fixed["WHOLE"] = size.width % chosen["BLOCK_F"] == 0
    tiles, blocks = positions(size, chosen["BLOCK_M"]) // chosen["BLOCK_M"], math.ceil(size.width / STREAM_BLOCK)
    each, slots = math.ceil(blocks / pieces), program_slots(chosen, multiprocessors)
    if kernel == "stream_backward_weights":
        cuts = [Piece(first, min(first + each, blocks), each, 0) for first in range(0, blocks, each)]
        return StreamPlan(tuple(cuts), cut(tiles, math.ceil(cuts[0].columns / chosen["BLOCK_F"]), slots)[0], fixed)
    _, split_blocks = cut(each, tiles, slots)
    found: list[Piece] = []
    for first in range(0, blocks, each):
        before = sum(piece.splits for piece in found)
        found.append(Piece(first, min(first + each, blocks), split_blocks, before))
    return StreamPlan(tuple(found), sum(piece.splits for piece in found), fixed)


def fitting(config: Config, extras: Extras) -> Config:
    """A configuration without what spills beside dropout or scale vectors.

    A forward step with dropout is one part, as the random numbers of two spill; and a bound on registers that a plain
    round fits in is none where a program also holds either.
    """
    found = dict(config)
    if extras.dropout and "PARTS" in found:
        found |= {"BLOCK_F": found["BLOCK_F"] // found["PARTS"], "PARTS": 1}
    if extras.dropout or extras.scales:
        found.pop("maxnreg", None)
    return found


def plan_of(kernel: str, operands: ExpertOperands, size: Sizes, activation: str) -> StreamPlan:
    """A kernel's plan for these operands."""
    gate = operands.pre_activations.gate
    extras = Extras(operands.dropout is not None, operands.scales is not None)
    large = operands.update is not None and 2 * gate.numel() * gate.element_size() > BUFFER_BYTES
    return stream_plan(kernel, size, activation, gate.dtype, gate.device, extras, 2 if large else 1)


def forward(
    operands: ExpertOperands, strides: RowStrides, size: Sizes, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r] of a call that `suits`, its operands laid out."""
    gate, kernels = operands.pre_activations.gate, _kernels()
    plan = plan_of("stream", operands, size, activation)
    block = plan.constants["BLOCK_M"]
    placed, own, added = (
        place(operands.expert_ids, operands.routing_weights, size, block),
        streamed(operands),
        buffer(operands.update, size, plan),
    )
    num_positions = len(placed.tokens)
    hidden = gate.new_empty((size.tokens, size.width))
    low_down = gate.new_empty((size.tokens, size.num_experts * size.rank))
    partial = gate.new_empty((plan.splits, num_positions, size.columns), dtype=torch.float32)
    for piece in plan.pieces:
        fold_product(added, operands.update, piece)
        launch(
            kernels.stream, (num_positions // block, piece.splits), own, strides, placed, added,
            plan.pieces[0].columns, piece, hidden, partial, num_positions, size.width, size.num_experts, scale,
            device=gate.device, **plan.constants,
        )  # fmt: skip
    launch(
        kernels.summing, (num_positions // SUMMING["BLOCK_M"],), partial, operands.expert_ids, placed, low_down,
        num_positions, plan.splits, size.num_experts, device=gate.device, SLOTS=size.slots, RANK=size.rank, **SUMMING,
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
    """The gradients of a call that `suits`: of tokens, and by name those of experts where any is ``needed``."""
    gate, kernels = operands.pre_activations.gate, _kernels()
    plan = plan_of("stream_backward_tokens", operands, size, activation)
    block = plan.constants["BLOCK_M"]
    placed, own, added = (
        place(operands.expert_ids, operands.routing_weights, size, block),
        streamed(operands),
        buffer(operands.update, size, plan),
    )
    num_positions, n, width = len(placed.tokens), size.num_experts, plan.pieces[0].columns
    found = empty_token_gradients(gate, size)
    partial = _no_stream_sums(gate, size, plan.splits, num_positions)
    experts = plan_of("stream_backward_weights", operands, size, activation)
    fixed = experts.constants | {"TILE": block}
    wanted = bool(needed & OF_EXPERTS)
    sums = no_weight_sums(gate, size, experts.splits, operands.scales is not None) if wanted else None
    for piece in plan.pieces:
        fold_product(added, operands.update, piece)
        launch(
            kernels.backward_tokens, (num_positions // block, piece.splits), own, strides, placed, added, width, piece,
            *grads, found, partial, num_positions, size.width, n, scale, device=gate.device, **plan.constants,
        )  # fmt: skip
        if sums is not None:
            stripes = math.ceil(min(piece.columns, size.width - piece.first_block * STREAM_BLOCK) / fixed["BLOCK_F"])
            launch(
                kernels.backward_weights, (stripes, experts.splits), own, strides, placed, added, width, piece,
                grads[0], partial.rows, sums, size.width, n, scale, device=gate.device, **fixed,
            )  # fmt: skip
    launch(
        kernels.summing_tokens, (num_positions // SUMMING["BLOCK_M"],), partial, operands.expert_ids, placed, found,
        num_positions, plan.splits, n, scale, device=gate.device, SLOTS=size.slots, RANK=size.rank, **SUMMING,
    )  # fmt: skip
    return found, {} if sums is None else sums.total()


def _no_stream_sums(gate: Tensor, size: Sizes, splits: int, num_positions: int) -> StreamSums:
    """Uninitialised, on the device of ``gate``."""
    shapes = [(splits, num_positions, c) for c in (size.columns, size.columns, padded_slots(size.slots))]
    rows = gate.new_empty((num_positions, size.slots, 3, padded_rank(size.rank)))
    of_gate, of_up, of_weights = (gate.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return StreamSums(of_gate, of_up, of_weights, rows)


def streamed(operands: ExpertOperands) -> ExpertOperands:
    """The operands that the kernels of a stream read themselves: H M^T is made by cuBLAS, and tokens are placed."""
    return operands._replace(update=None, token_order=None)


def buffer(update: LowRankUpdate | None, size: Sizes, plan: StreamPlan) -> GateUp | None:
    """Where H M^T of a piece's columns goes, [N, columns] each."""
    if update is None:
        return None
    return GateUp(*update.state.new_empty((2, size.tokens, plan.pieces[0].columns)).unbind())


def fold_product(added: GateUp | None, update: LowRankUpdate | None, piece: Piece) -> None:
    """Write H M^T of a piece's columns to ``added``, [N, columns] each."""
    if added is None or update is None:
        return
    for out, fold in zip(added, (update.gate, update.up), strict=True):
        rows = fold[piece.first_block * STREAM_BLOCK : piece.end_block * STREAM_BLOCK]  # [columns, G]
        torch.mm(update.state, rows.T, out=out[:, : len(rows)])
