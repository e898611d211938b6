"""The expert round's forward for many tokens: plain steps over tiles of tokens that share all their experts.

H M^T by cuBLAS into a buffer, one kernel that streams over it and P_1, and a small sum over the splits of F. Two small
kernels before them put tokens with the same experts together and pad each tuple of experts to whole tiles. Grids follow
from the most tiles that there can be, so the host waits for nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import interpreting
from graphmoe_kernels.experts.call import Call, Sizes, cut, program_slots, scratch
from graphmoe_kernels.launching import (
    SKINNY_TOKENS,
    SMALLEST_TILE,
    Config,
    dtype_class,
    launch,
    multiprocessors,
    power_of_two,
)

# A tuple of experts needs so many tokens on average. It is padded by half a tile of 32, so that there are no more rows
# of padding than tokens. Measured on an H100 with 18 tokens a tuple and 75% padding: 2.3 times as fast as without.
TUPLE_TOKENS = 16
# The kernels that put tokens together hold a count of every tuple in registers.
MAX_TUPLES = 255
# Columns of a token's compact low-rank rows, with which the tile's loads fit in registers and shared memory.
MAX_STREAM_COLUMNS = 32
# H M^T is made in one piece up to this size; beyond, in two, so that it takes no more memory than c.
BUFFER_BYTES = 2**26
# Tokens of a program, and blocks of them that are read at a time, of the kernels that put tokens together.
PLACING = {"BLOCK_N": 64, "num_warps": 4}
PLACED_BLOCKS = 32
# Rows of a program that sums the splits.
SUMMING = {"BLOCK_M": SMALLEST_TILE, "num_warps": 4}


def tuples(size: Sizes) -> int:
    """How many different tuples of experts a token can have, of one expert or two."""
    return math.comb(size.num_experts, size.slots)


def suits(size: Sizes, dtype: torch.dtype) -> bool:
    """Whether a call runs as a stream: many tokens in half precision, each with one or two whole experts."""
    return (
        dtype_class(dtype) == "half"
        and size.slots <= 2
        and size.rank > 0
        and size.columns <= MAX_STREAM_COLUMNS
        and tuples(size) <= MAX_TUPLES
        and size.tokens > max(SKINNY_TOKENS, TUPLE_TOKENS * tuples(size))
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


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r] of a call that `suits`."""
    from graphmoe_kernels.experts.triton_stream import stream_kernel, stream_sum_kernel

    size, gate = call.size, call.inputs.gate
    config = tile(call.config("stream"), call.arguments["DROPOUT"])
    order = place(call, config["BLOCK_M"])
    positions, pieces = len(order), cut_width(call, config, len(order))
    splits = sum(piece.splits for piece in pieces)
    c = torch.empty(size.tokens, size.width, dtype=gate.dtype, device=gate.device)
    z = torch.empty(size.tokens, size.num_experts * size.rank, dtype=gate.dtype, device=gate.device)
    shared = call.arguments | {
        "order": order,
        "positions": positions,
        "partial": scratch(gate, splits, positions, size.columns),
        "COLUMNS": size.columns,
        "APPROXIMATE": not interpreting(),
    }
    buffer = _buffer(call, config, pieces)
    for piece in pieces:
        own = shared | {"c": c} | piece._asdict() | fold_product(call, buffer, piece, config["BLOCK_F"])
        grid = (positions // config["BLOCK_M"], piece.splits)
        launch(stream_kernel, grid, device=gate.device, **_taken(stream_kernel, own), **config)
    own = shared | {"z": z, "splits": splits}
    programs = positions // SUMMING["BLOCK_M"]
    launch(stream_sum_kernel, (programs,), device=gate.device, **_taken(stream_sum_kernel, own), **SUMMING)
    return c, z


def tile(config: Config, dropping: bool) -> Config:
    """The kernel's configuration; with dropout a step is one part of it, as the random numbers of two spill."""
    return config | {"BLOCK_F": config["BLOCK_F"] // config["PARTS"], "PARTS": 1} if dropping else config


def place(call: Call, block: int) -> Tensor:
    """Tokens by tuple of experts, int32, each tuple's followed by -1 up to whole tiles of ``block``.

    As long as the most tiles that the tokens can need, whatever their experts; what is left is -1.
    """
    from graphmoe_kernels.experts.triton_tuples import count_tuples, place_tokens

    size, device = call.size, call.device
    groups = tuples(size) + 1  # one more is of ids that are no tuple
    positions = (size.tokens + groups * (block - 1)) // block * block
    blocks = math.ceil(size.tokens / PLACING["BLOCK_N"])
    shared = call.arguments | {
        "counts": torch.empty(blocks, power_of_two(groups), dtype=torch.int32, device=device),
        "order": torch.empty(positions, dtype=torch.int32, device=device),
        "blocks": blocks,
        "positions": positions,
        "KEYS": power_of_two(groups),
    }
    launch(count_tuples, (blocks,), device=device, **_taken(count_tuples, shared), **PLACING)
    own = _taken(place_tokens, shared) | {"BLOCK_B": PLACED_BLOCKS, "BLOCK_M": block}
    launch(place_tokens, (blocks + 1,), device=device, **own, **PLACING)
    return shared["order"]


def cut_width(call: Call, config: Config, positions: int) -> list[Piece]:
    """F in the pieces of a launch each, one unless H M^T is large, cut into splits that keep the device busy."""
    size, gate = call.size, call.inputs.gate
    blocks = math.ceil(size.width / config["BLOCK_F"])
    large = call.inputs.update is not None and 2 * gate.numel() * gate.element_size() > BUFFER_BYTES
    each = math.ceil(blocks / 2) if large else blocks
    slots = program_slots(config, multiprocessors(call.device))
    _, split_blocks = cut(each, positions // config["BLOCK_M"], slots)
    pieces: list[Piece] = []
    for first in range(0, blocks, each):
        before = sum(piece.splits for piece in pieces)
        pieces.append(Piece(first, min(first + each, blocks), split_blocks, before))
    return pieces


def _buffer(call: Call, config: Config, pieces: list[Piece]) -> Tensor | None:
    """Room for a piece's H M^T of gate and up, [2, N, columns], or None where there is none to add."""
    if call.inputs.update is None:
        return None
    columns = (pieces[0].end_block - pieces[0].first_block) * config["BLOCK_F"]
    return call.inputs.gate.new_empty(2, call.size.tokens, columns)


def fold_product(call: Call, buffer: Tensor | None, piece: Piece, block: int) -> dict[str, object]:
    """The kernel's arguments for H M^T of a piece, computed into ``buffer``."""
    if buffer is None or call.inputs.update is None:
        return {"added_gate": None, "added_up": None, "stride_added": 0}
    state, *folds = call.inputs.update
    for out, fold in zip(buffer, folds, strict=True):
        rows = fold[piece.first_block * block : piece.end_block * block]  # [columns, G]
        torch.mm(state, rows.T, out=out[:, : len(rows)])
    return {"added_gate": buffer[0], "added_up": buffer[1], "stride_added": buffer.stride(1)}


def _taken(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the kernel has."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}
