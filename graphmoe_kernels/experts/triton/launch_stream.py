"""The expert round's forward for many tokens: plain steps over tiles of tokens that share all their experts.

H M^T by cuBLAS into a buffer, one kernel that streams over it and P_1, and a small sum over the splits of F. Two small
kernels before them put tokens with the same experts together and pad each tuple of experts to whole tiles. Grids follow
from the most tiles that there can be, so the host waits for nothing.
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
from graphmoe_kernels.experts.triton.layout import RowStrides
from graphmoe_kernels.experts.triton.plan import config, constants, target
from graphmoe_kernels.experts.triton.sizes import Sizes, cut, program_slots
from graphmoe_kernels.launching import SKINNY_TOKENS, SMALLEST_TILE, Config, dtype_class, launch, power_of_two

# A tuple of experts needs so many tokens on average. It is padded by half a tile of 32, so that there are no more rows
# of padding than tokens. Measured on an H100 with 18 tokens per tuple and 75% padding: 2.3 times as fast as without.
TUPLE_TOKENS = 16
# The kernels that put tokens together hold a count of every tuple in registers.
MAX_TUPLES = 255
# Columns of a token's compact low-rank rows, with which the tile's loads fit in registers and shared memory.
MAX_STREAM_COLUMNS = 32
# H M^T is made in one piece up to this size; beyond, in two, so that it takes no more memory than hidden.
BUFFER_BYTES = 2**26
# Tokens of a program, and blocks of them that are read at a time, of the kernels that put tokens together.
PLACING = {"BLOCK_M": 64, "num_warps": 4}
PLACED_BLOCKS = 32
# Rows of a program that sums the splits.
SUMMING = {"BLOCK_M": SMALLEST_TILE, "num_warps": 4}


def tuples(size: Sizes) -> int:
    """How many different tuples of experts a token can have, of one expert or two."""
    return math.comb(size.num_experts, size.slots)


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
    """Blocks of columns that one launch streams over, and how they are split among its programs."""

    first_block: int
    end_block: int
    split_blocks: int
    first_split: int

    @property
    def splits(self) -> int:
        """How many programs share the blocks of a tile."""
        return math.ceil((self.end_block - self.first_block) / self.split_blocks)


class StreamPlan(NamedTuple):
    """How a stream is launched; see `graphmoe_kernels.experts.triton.plan`.

    Attributes:
        num_positions: places of tokens, as many as the most tiles that they can need, whatever their experts.
        keys: the power of two that holds the tuples, and one more for ids that are no tuple.
        pieces: blocks of columns of a launch each.
        columns: of the widest piece, in elements.
        stream, summing, counting, placing: constants of the four kernels.
    """

    num_positions: int
    keys: int
    pieces: tuple[Piece, ...]
    columns: int
    stream: dict[str, Any]
    summing: dict[str, int]
    counting: dict[str, int]
    placing: dict[str, int]


@per_device
def stream_plan(
    size: Sizes,
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    dropping: bool,
    pieces: int,
    approximate: bool,
) -> StreamPlan:
    """The plan of a call that `suits`, with F in so many pieces."""
    device_class, multiprocessors = target(device)
    chosen = tile(config("stream", size, dtype, device_class), dropping)
    block, groups = chosen["BLOCK_M"], tuples(size) + 1
    num_positions = (size.tokens + groups * (block - 1)) // block * block
    launches = cut_width(size, chosen, num_positions // block, multiprocessors, pieces)
    keys = power_of_two(groups)
    return StreamPlan(
        num_positions,
        keys,
        launches,
        (launches[0].end_block - launches[0].first_block) * chosen["BLOCK_F"],
        {**constants(size, activation, chosen), "APPROXIMATE": approximate},
        {"SLOTS": size.slots, "RANK": size.rank, **SUMMING},
        {"SLOTS": size.slots, "KEYS": keys, **PLACING},
        {"SLOTS": size.slots, "KEYS": keys, "BLOCK_B": PLACED_BLOCKS, "TILE": block, **PLACING},
    )


def tile(config: Config, dropping: bool) -> Config:
    """The kernel's configuration; with dropout a step is one part of it, as the random numbers of two spill."""
    return config | {"BLOCK_F": config["BLOCK_F"] // config["PARTS"], "PARTS": 1} if dropping else config


def cut_width(size: Sizes, config: Config, tiles: int, multiprocessors: int, pieces: int) -> tuple[Piece, ...]:
    """F in the pieces of a launch each, cut into splits that keep the device busy."""
    blocks = math.ceil(size.width / config["BLOCK_F"])
    each = math.ceil(blocks / pieces)
    _, split_blocks = cut(each, tiles, program_slots(config, multiprocessors))
    found: list[Piece] = []
    for first in range(0, blocks, each):
        before = sum(piece.splits for piece in found)
        found.append(Piece(first, min(first + each, blocks), split_blocks, before))
    return tuple(found)


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels, imported by the first call, as Triton may be missing where nothing runs on it."""
    from graphmoe_kernels.experts.triton.stream import experts_stream, experts_stream_sum
    from graphmoe_kernels.experts.triton.tuples import experts_count_tuples, experts_place_tokens

    return SimpleNamespace(
        stream=experts_stream, summing=experts_stream_sum, counting=experts_count_tuples, placing=experts_place_tokens
    )


def plan_of(operands: ExpertOperands, size: Sizes, activation: str) -> StreamPlan:
    """The plan for these operands."""
    gate, dropping = operands.pre_activations.gate, operands.dropout is not None
    large = operands.update is not None and 2 * gate.numel() * gate.element_size() > BUFFER_BYTES
    pieces = 2 if large else 1
    return stream_plan(size, activation, gate.dtype, gate.device, dropping, pieces, not interpreting())


def forward(
    operands: ExpertOperands, strides: RowStrides, size: Sizes, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    """hidden [N, F] and low_down [N, n*r] of a call that `suits`, its operands laid out."""
    gate, update = operands.pre_activations.gate, operands.update
    plan, kernels = plan_of(operands, size, activation), _kernels()
    order = place(operands.expert_ids, size, plan)
    splits = sum(piece.splits for piece in plan.pieces)
    hidden = gate.new_empty((size.tokens, size.width))
    low_down = gate.new_empty((size.tokens, size.num_experts * size.rank))
    partial = gate.new_empty((splits, plan.num_positions, size.columns), dtype=torch.float32)
    added = None if update is None else GateUp(*gate.new_empty((2, size.tokens, plan.columns)).unbind())
    own = operands._replace(update=None, token_order=order)  # H M^T is made by cuBLAS
    for piece in plan.pieces:
        if update is not None and added is not None:
            fold_product(added, update, piece, plan)
        launch(
            kernels.stream, (plan.num_positions // plan.stream["BLOCK_M"], piece.splits), own, strides, added,
            plan.columns, piece, hidden, partial, plan.num_positions, size.width, size.num_experts, scale,
            device=gate.device, **plan.stream,
        )  # fmt: skip
    launch(
        kernels.summing, (plan.num_positions // SUMMING["BLOCK_M"],), partial, operands.expert_ids, order, low_down,
        plan.num_positions, splits, size.num_experts, device=gate.device, **plan.summing,
    )  # fmt: skip
    return hidden, low_down


def place(expert_ids: Tensor, size: Sizes, plan: StreamPlan) -> Tensor:
    """Tokens by tuple of experts, int32, each tuple's followed by -1 up to whole tiles; what is left is -1."""
    kernels, device = _kernels(), expert_ids.device
    blocks = math.ceil(size.tokens / PLACING["BLOCK_M"])
    counts = expert_ids.new_empty((blocks, plan.keys), dtype=torch.int32)
    order = expert_ids.new_empty((plan.num_positions,), dtype=torch.int32)
    launch(
        kernels.counting, (blocks,), expert_ids, counts, size.tokens, size.num_experts, device=device, **plan.counting
    )
    launch(
        kernels.placing, (blocks + 1,), expert_ids, counts, order, size.tokens, plan.num_positions, size.num_experts,
        device=device, **plan.placing,
    )  # fmt: skip
    return order


def fold_product(added: GateUp, update: LowRankUpdate, piece: Piece, plan: StreamPlan) -> None:
    """Write H M^T of a piece's columns to ``added``, [N, columns] each."""
    block = int(plan.stream["BLOCK_F"])
    for out, fold in zip(added, (update.gate, update.up), strict=True):
        rows = fold[piece.first_block * block : piece.end_block * block]  # [columns, G]
        torch.mm(update.state, rows.T, out=out[:, : len(rows)])
