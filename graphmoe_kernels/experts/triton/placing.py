"""Rows put together by their experts, for the kernels of a stream."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import per_device
from graphmoe_kernels.experts.triton.sizes import Sizes, Tiling
from graphmoe_kernels.launching import launch, power_of_two

# Rows of a program that are placed at a time, and how many programs may share them: each one reads all their counts.
PLACING = {"BLOCK_M": 64, "num_warps": 8}
MAX_BLOCKS = 128
# Counts that a program reads at a time.
COUNTS = 8192


class Placed(NamedTuple):
    """Rows by tuple of experts, each tuple's padded to whole tiles. Row i * rows per token + j is token i's j-th.

    Attributes:
        rows: [positions] int32, -1 where there is none: as many as the most tiles that there can be.
        places: [rows] int32, a row's position.
        experts: [tiles, experts of a tile] int32, rising; n for ids that are no tuple.
        weights: [positions, experts of a tile] fp32, the routing weights in the experts' order; 0 of none.
        ends: [tiles] int32, the tile after the last one of the same tuple.
        used: [launches] int32, the tile after the last one of each launch, which has those from the launch before on.
    """

    rows: Tensor
    places: Tensor
    experts: Tensor
    weights: Tensor
    ends: Tensor
    used: Tensor


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The kernels, imported by the first call, as Triton may be missing where nothing runs on it."""
    from graphmoe_kernels.experts.triton.tuples import experts_count_tuples, experts_place_rows

    return experts_count_tuples, experts_place_rows


@per_device
def positions(size: Sizes, tiling: Tiling, block: int) -> int:
    """Places of a launch's rows: as many as the most tiles of ``block`` that they can need, whatever their experts."""
    rows = size.tokens * tiling.rows_together
    return (rows + min(tiling.tuples + 1, rows) * (block - 1)) // block * block


def place(ids: Tensor, routing_weights: Tensor, size: Sizes, tiling: Tiling, block: int) -> Placed:
    """Put the rows together by their experts, in tiles of ``block``: ids [N, k], routing weights [N, k]."""
    counting, placing = _kernels()
    num_positions = positions(size, tiling, block) * tiling.launches
    keys = power_of_two(tiling.tuples + 1) * tiling.launches
    rows, tiles = size.tokens * tiling.rows, num_positions // block
    chunks = math.ceil(rows / PLACING["BLOCK_M"] / MAX_BLOCKS)
    blocks = math.ceil(rows / (PLACING["BLOCK_M"] * chunks))
    counts = ids.new_empty((blocks, keys), dtype=torch.int32)
    placed = Placed(
        ids.new_empty((num_positions,), dtype=torch.int32),
        ids.new_empty((rows,), dtype=torch.int32),
        ids.new_empty((tiles, tiling.experts), dtype=torch.int32),
        ids.new_empty((num_positions, tiling.experts), dtype=torch.float32),
        ids.new_empty((tiles,), dtype=torch.int32),
        ids.new_empty((tiling.launches,), dtype=torch.int32),
    )
    fixed = {"SLOTS": size.slots, "EXPERTS": tiling.experts, "LAUNCHES": tiling.launches, "KEYS": keys, **PLACING}
    launch(counting, (blocks,), ids, counts, rows, chunks, size.num_experts, device=ids.device, **fixed)
    launch(
        placing, (blocks + 1,), ids, routing_weights, counts, placed, rows, chunks, num_positions, size.num_experts,
        device=ids.device, BLOCK_B=max(1, COUNTS // keys), TILE=block, **fixed,
    )  # fmt: skip
    return placed
