"""The order in which the programs of a grid run.

The stock interpreter runs program 0 first and the last one last. A GPU promises no order: a kernel that relies on it
(a counter's values, the last arriver of a reduction) passes every test in the stock order and fails on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_order: str | int | None = None


@contextmanager
def grid_order(order: str | int) -> Iterator[None]:
    """Run the programs of every launch last one first (``"reverse"``) or in a random order, drawn by an int seed."""
    global _order
    if order != "reverse" and not isinstance(order, int):
        raise ValueError(f"order is {order!r}; expected 'reverse' or an int seed")
    before, _order = _order, order
    try:
        yield
    finally:
        _order = before


def reordered(index: tuple[int, int, int], grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The program that runs when it is ``index``'s turn."""
    if _order is None:
        return index
    count = grid[0] * grid[1] * grid[2]
    turn = (index[0] * grid[1] + index[1]) * grid[2] + index[2]
    if _order == "reverse":
        chosen = count - 1 - turn
    else:
        chosen = _permutation(_order, count)[turn]
    return chosen // (grid[1] * grid[2]), chosen // grid[2] % grid[1], chosen % grid[2]


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).permutation(count).tolist()
