"""Tokens put together by their tuple of experts, for the kernels of a stream."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import per_device
from graphmoe_kernels.experts.triton.sizes import Sizes
from graphmoe_kernels.launching import launch, power_of_two

# Tokens of a program, and blocks of them that are read at a time, of the kernels that put tokens together.
PLACING = {"BLOCK_M": 64, "num_warps": 8}
PLACED_BLOCKS = 16


class Placed(NamedTuple):
    """Tokens by tuple of experts, each tuple's padded to whole tiles.

    Attributes:
        tokens: [positions] int32, -1 where there is none: as many as the most tiles that there can be.
        experts: [tiles, k] int32, rising; n for ids that are no tuple.
        weights: [positions, k] fp32, the routing weights in the experts' order; 0 of none.
        ends: [tiles] int32, the tile after the last one of the same tuple.
        used: [1] int32, how many tiles there are.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    ends: Tensor
    used: Tensor


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The kernels, imported by the first call, as Triton may be missing where nothing runs on it."""
    from graphmoe_kernels.experts.triton.tuples import experts_count_tuples, experts_place_tokens

    return experts_count_tuples, experts_place_tokens


def tuples(size: Sizes) -> int:
    """How many different tuples of experts a token can have, of one expert or two."""
    return math.comb(size.num_experts, size.slots)


@per_device
def positions(size: Sizes, block: int) -> int:
    """Places of tokens: as many as the most tiles of ``block`` that they can need, whatever their experts."""
    return (size.tokens + (tuples(size) + 1) * (block - 1)) // block * block


def place(ids: Tensor, routing_weights: Tensor, size: Sizes, block: int) -> Placed:
    """Put the tokens together by their experts, in tiles of ``block``: ids [N, k], routing weights [N, k]."""
    counting, placing = _kernels()
    num_positions, keys = positions(size, block), power_of_two(tuples(size) + 1)
    blocks = math.ceil(size.tokens / PLACING["BLOCK_M"])
    counts = ids.new_empty((blocks, keys), dtype=torch.int32)
    placed = Placed(
        ids.new_empty((num_positions,), dtype=torch.int32),
        ids.new_empty((num_positions // block, size.slots), dtype=torch.int32),
        ids.new_empty((num_positions, size.slots), dtype=torch.float32),
        ids.new_empty((num_positions // block,), dtype=torch.int32),
        ids.new_empty((1,), dtype=torch.int32),
    )
    fixed = {"SLOTS": size.slots, "KEYS": keys, **PLACING}
    launch(counting, (blocks,), ids, counts, size.tokens, size.num_experts, device=ids.device, **fixed)
    launch(
        placing, (blocks + 1,), ids, routing_weights, counts, placed, size.tokens, num_positions,
        size.num_experts, device=ids.device, BLOCK_B=PLACED_BLOCKS, TILE=block, **fixed,
    )  # fmt: skip
    return placed
