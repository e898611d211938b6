"""How the kernels of a stream are launched: F in pieces, each split among programs; worked out once for all sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from graphmoe_kernels.backend import interpreting, per_device
from graphmoe_kernels.experts.operands import ExpertOperands
from graphmoe_kernels.experts.triton.placing import positions
from graphmoe_kernels.experts.triton.plan import constants, target
from graphmoe_kernels.experts.triton.sizes import (
    MAX_PAIR_COLUMNS,
    MAX_REGISTERS,
    STREAM_BLOCK,
    Sizes,
    Tiling,
    compact_columns,
    cut,
    program_slots,
    tiling,
)
from graphmoe_kernels.launching import Config, config_table, dtype_class

# H M^T, and what rows of one slot give, are made in one piece up to this size; beyond, in as many as keep each of them
# no larger than hidden.
BUFFER_BYTES = 2**26
# The backward to experts adds up the sums of all experts for every split of the tiles: at Llama-3-8B's sizes each
# expert takes 2.75 MB, which are cleared, written, read and summed: 29 us per split of eight experts on an H100. By the
# model of time two splits of them are as fast as seven. So splits times experts are no more than this; and
# of so many experts, where a tile has one of them, a split takes all of an expert's tiles, so that they share one sum.
MAX_EXPERT_SUMS = 40
MANY_EXPERTS = 8


class Piece(NamedTuple):
    """Blocks of `STREAM_BLOCK` columns that one launch streams over, and how they are split among its programs; the
    launch's number where several have the tiles.
    """

    first_block: int
    end_block: int
    split_blocks: int
    first_split: int
    number: int = 0

    @property
    def splits(self) -> int:
        """How many programs share the blocks of a tile."""
        return math.ceil((self.end_block - self.first_block) / self.split_blocks)

    def launches(self, count: int) -> list[Piece]:
        """The piece for each launch, by its number."""
        return [self._replace(number=number) for number in range(count)]

    def columns(self, width: int) -> slice:
        """Its columns of F."""
        return slice(self.first_block * STREAM_BLOCK, min(self.end_block * STREAM_BLOCK, width))


class StreamPlan(NamedTuple):
    """How a kernel is launched that streams over F; see `graphmoe_kernels.experts.triton.plan`.

    Attributes:
        pieces: one for each launch.
        splits: of all pieces; of the backward to experts, of the tiles instead.
        tiling: what the kernel's tiles are.
        constants: the kernel's.
    """

    pieces: tuple[Piece, ...]
    splits: int
    tiling: Tiling
    constants: dict[str, Any]


class Extras(NamedTuple):
    """What a call has that takes registers beside the round itself."""

    update: bool
    dropout: bool
    scales: bool


def stream_plan(kernel: str, operands: ExpertOperands, size: Sizes, activation: str) -> StreamPlan:
    """A kernel's plan for these operands."""
    gate = operands.pre_activations.gate
    extras = Extras(*(x is not None for x in (operands.update, operands.dropout, operands.scales)))
    rows, pieces = tiling(size).rows_together, 1
    if gate.numel() * gate.element_size() * max(rows, 2) > BUFFER_BYTES:
        pieces = 1 if operands.update is None and rows == 1 else 2 * rows
    return _plan(kernel, size, activation, gate.dtype, gate.device, extras, pieces)


@per_device
def _plan(
    kernel: str, size: Sizes, activation: str, dtype: torch.dtype, device: torch.device, extras: Extras, pieces: int
) -> StreamPlan:
    device_class, multiprocessors = target(device)
    own = tiling(size)
    chosen = fitting(stream_config(kernel, size, own, dtype, device_class), extras)
    fixed = constants(size, activation, chosen) | {"EXPERTS": own.experts, "LAUNCHES": own.launches}
    if kernel == "stream":
        fixed["APPROXIMATE"] = not interpreting()
    else:
        fixed["WHOLE"] = size.width % chosen["BLOCK_F"] == 0
    tiles = positions(size, own, chosen["BLOCK_M"]) // chosen["BLOCK_M"]
    blocks = math.ceil(size.width / STREAM_BLOCK)
    each, slots = math.ceil(blocks / pieces), program_slots(chosen, multiprocessors)
    starts = range(0, blocks, each)
    if kernel == "stream_backward_weights":
        cuts = [Piece(first, min(first + each, blocks), each, 0) for first in starts]
        stripes = math.ceil(each * STREAM_BLOCK / chosen["BLOCK_F"])
        fixed["SHARED"] = own.experts == 1 and size.num_experts >= MANY_EXPERTS
        most = size.num_experts if fixed["SHARED"] else max(1, MAX_EXPERT_SUMS // size.num_experts)
        return StreamPlan(tuple(cuts), cut(tiles, stripes, slots, most)[0], own, fixed)
    _, split_blocks = cut(each, tiles, slots)
    found: list[Piece] = []
    for first in starts:
        before = sum(piece.splits for piece in found)
        found.append(Piece(first, min(first + each, blocks), split_blocks, before))
    return StreamPlan(tuple(found), sum(piece.splits for piece in found), own, fixed)


def stream_config(kernel: str, size: Sizes, own: Tiling, dtype: torch.dtype, device_class: str) -> Config:
    """The configuration of a stream's kernel; of high ranks, and of rows that are not aligned, blocks are smaller."""
    name = f"experts_{kernel}"
    if compact_columns(own.experts, size.rank) > MAX_PAIR_COLUMNS:
        name += "_wide_rank"
    elif size.width % 16:
        name += "_unaligned"
    return config_table(device_class, "experts")[name]["wide"][dtype_class(dtype)]


def fitting(config: Config, extras: Extras) -> Config:
    """A configuration without what spills in a loop beside H M^T, dropout or scale vectors.

    A forward step is one part where a round is plain (measured on an H100: 370 us against 430 us in two), and where it
    has dropout, whose random numbers take the registers of half the columns. A backward's bound on registers that a
    plain round fits in is the largest where a program also holds either. (Where nothing is said, the assembler itself
    bounds them for the sake of occupancy, and spills a few bytes for it.)
    """
    found = dict(config)
    if "PARTS" in found:
        if extras.dropout:
            found["BLOCK_F"] //= found["PARTS"]
        if extras.dropout or not (extras.update or extras.scales):
            found["PARTS"] = 1
    if "maxnreg" in found and (extras.dropout or extras.scales):
        found["maxnreg"] = MAX_REGISTERS
    return found
