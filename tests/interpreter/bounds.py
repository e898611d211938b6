"""Every address that an active lane loads, stores or updates lies inside a tensor argument of the launch.

The stock interpreter reads and writes raw addresses of this process: just past a tensor usually lies another one, so
that a missing mask gives a plausible result, or spoils a tensor that no one looks at. On a GPU the same access may
fault, or spoil someone else's memory.
"""

from __future__ import annotations

import numpy as np

from tests.interpreter.memory import Region


class BoundsError(Exception):
    """An active lane uses an address outside every tensor argument of the launch."""


def check(access: str, addresses: np.ndarray, itemsize: int, regions: list[Region], program: tuple[int, ...]) -> None:
    """`BoundsError` unless each element at ``addresses`` lies wholly in one region."""
    low, high = int(addresses.min()), int(addresses.max()) + itemsize
    if any(region.start <= low and high <= region.end for region in regions):
        return
    inside = np.zeros(addresses.shape, dtype=bool)
    for region in regions:
        if region.end - region.start >= itemsize:
            last = np.uint64(region.end - itemsize)
            inside |= (addresses >= np.uint64(region.start)) & (addresses <= last)
    if inside.all():
        return
    first = int(addresses[~inside][0])
    near = min(regions, key=lambda r: max(r.start - first, first + itemsize - r.end), default=None)
    where = ""
    if near is not None:
        where = f"; the first is element {(first - near.start) // near.itemsize} counted from the start of {near.name}"
        where += f", which has {(near.end - near.start) // near.itemsize}"
    raise BoundsError(
        f"program {program}: {int((~inside).sum())} of {inside.size} active lanes {access} outside every tensor{where}"
    )
