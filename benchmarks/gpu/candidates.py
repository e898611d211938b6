"""The configurations that tuning tries, kernel by kernel.

A candidate is a tile, a number of warps and a pipeline depth. Tiles of matrix kernels are 16 rows for few tokens (what
a matrix instruction takes) and 64 or 128 for many (what a warp group's takes); deeper pipelines than these do not fit
in shared memory beside such tiles. What does not compile, does not fit or is wrong is left out when it is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from graphmoe_kernels.launching import Config

# Accumulators of a thread, in 32-bit registers, above which a kernel is known to spill.
MAX_ACCUMULATORS = 160
# fp32 tiles [BLOCK_M, BLOCK_*] that a program of each kernel holds at once, roughly.
TILES_HELD = {"forward": 5, "backward_tokens": 7, "backward_weights": 7, "gru_forward": 2, "gru_backward": 2}

# (warps, stages)
DEPTHS: tuple[tuple[int, int], ...] = ((8, 3), (4, 3), (8, 2), (4, 2))
# kernel -> size class -> dtype class -> (rows, columns, inner)
EXPERT_TILES: dict[str, dict[str, tuple[tuple[int, int, int], ...]]] = {
    "wide": {
        "half": ((128, 64, 64), (64, 64, 64), (64, 128, 64), (128, 64, 32), (64, 64, 32), (128, 32, 64), (64, 32, 64)),
        "float": ((32, 32, 32), (64, 32, 32), (32, 64, 32), (16, 32, 32), (64, 64, 16)),
    },
    "skinny": {
        "half": ((16, 64, 128), (16, 64, 64), (16, 32, 128), (16, 128, 64), (16, 128, 128)),
        "float": ((16, 32, 32), (16, 64, 32), (16, 64, 64), (16, 16, 32)),
    },
}
GRU_TILES: dict[str, dict[str, tuple[tuple[int, int, int], ...]]] = {
    "wide": {
        "half": ((64, 64, 64), (128, 64, 64), (64, 128, 64), (64, 64, 32), (64, 32, 64), (128, 128, 32)),
        "float": ((32, 64, 32), (64, 64, 32), (32, 32, 32), (64, 32, 32)),
    },
    "skinny": {
        "half": ((16, 32, 128), (16, 16, 128), (16, 64, 128), (16, 32, 64)),
        "float": ((16, 32, 64), (16, 16, 64), (16, 64, 64), (16, 32, 32)),
    },
}
ROUTING_ROWS = {"wide": (16, 32, 64, 128), "skinny": (16,)}
ROUTING_INNER = {"half": (64, 128, 256), "float": (32, 64, 128)}
# A program of one token, which multiplies without matrix units.
ALONE_INNER = (512, 1024, 2048, 4096)


def candidates(operator: str, kernel: str, size: str, dtype: str) -> list[Config]:
    """What is tried for a kernel of an operator, in a size class and a dtype class, likely ones first.

    Raises:
        ValueError: an unknown operator.
    """
    if kernel == "stream":
        tried = itertools.product((32, 64, 16), (64, 32, 128), (2, 1), (3, 4, 2))
        return [  # a warp for each 16 rows: more would compute everything twice
            {"BLOCK_M": m, "BLOCK_F": f, "PARTS": parts, "num_warps": m // 16, "num_stages": stages}
            for m, f, parts, stages in tried
            if f // parts in (32, 64)
        ]
    if operator == "experts":
        return _expert_candidates(kernel.removesuffix("_wide_rank"), EXPERT_TILES[size][dtype])
    if operator == "gru":
        return _tiled(kernel, "BLOCK_G", GRU_TILES[size][dtype])
    if operator != "routing":
        raise ValueError(f"unknown operator {operator!r}; expected 'experts', 'gru' or 'routing'")
    if kernel == "forward" and size == "skinny":
        tried = itertools.product((1,), ALONE_INNER, (4, 8), (1,))
        return [{"BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s} for n, k, w, s in tried]
    if kernel == "forward":
        tried = itertools.product(ROUTING_ROWS[size], ROUTING_INNER[dtype], (4, 8), (3, 4))
        return [{"BLOCK_N": n, "BLOCK_K": k, "num_warps": w, "num_stages": s} for n, k, w, s in tried]
    if kernel == "backward":
        return [{"BLOCK_N": n, "num_warps": w, "num_stages": 1} for n in ROUTING_ROWS[size] for w in (2, 4, 8)]
    compared = itertools.product((16, 32, 64), (64, 128, 256), (4, 8))
    return [{"BLOCK_N": n, "BLOCK_J": j, "num_warps": w, "num_stages": 1} for n, j, w in compared]


def _expert_candidates(kernel: str, tiles: Sequence[tuple[int, int, int]]) -> list[Config]:
    """Tiles whole and in two parts; backward_weights takes its BLOCK_M from backward_tokens."""
    found = [
        {**config, "PARTS": parts}
        for parts in (2, 1)
        for config in _tiled(kernel, "BLOCK_F", tiles, parts)
        if config["BLOCK_F"] // parts >= 16
    ]
    if kernel == "backward_weights":
        narrower = [{name: size for name, size in config.items() if name != "BLOCK_M"} for config in found]
        return [config for number, config in enumerate(narrower) if config not in narrower[:number]]
    return found


def _tiled(kernel: str, columns: str, tiles: Sequence[tuple[int, int, int]], parts: int = 1) -> list[Config]:
    """Tiles by depths; of a tile in parts two accumulators are whole and the rest belong to one part at a time."""
    held = min(2, TILES_HELD[kernel]) + max(0, TILES_HELD[kernel] - 2) / parts
    return [
        {"BLOCK_M": m, columns: c, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for (m, c, k), (warps, stages) in itertools.product(tiles, DEPTHS)
        if held * m * c / (32 * warps) <= MAX_ACCUMULATORS
    ]
