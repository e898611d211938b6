"""What a launch may touch: the tensors among its arguments, and the addresses that an access really uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Region(NamedTuple):
    """The bytes ``[start, end)`` of one tensor argument, from its first to its last element."""

    name: str
    start: int
    end: int
    itemsize: int


def regions(arguments: Mapping[str, Any]) -> list[Region]:
    """The regions of a launch's tensors (also in tuples and tensor descriptors), in the order of their addresses."""
    return sorted((r for name, value in arguments.items() for r in _regions(name, value)), key=lambda r: r.start)


def _regions(name: str, value: Any) -> Iterator[Region]:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _regions(f"{name}[{index}]", item)
    elif hasattr(value, "block_shape"):  # a tensor descriptor
        yield from _regions(name, value.base)
    elif hasattr(value, "data_ptr"):
        tensor = value if hasattr(value, "numel") else value.base  # triton's TensorWrapper has a base
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start, itemsize = tensor.data_ptr(), tensor.element_size()
            yield Region(name, start, start + (last + 1) * itemsize, itemsize)


def active_lanes(lanes: np.ndarray, mask: Any) -> np.ndarray:
    """The entries of ``lanes`` (addresses or values) that the mask, an interpreter's handle or None, lets through."""
    if mask is None:
        return lanes.ravel()
    return lanes[np.broadcast_to(np.asarray(getattr(mask, "data", mask), dtype=bool), lanes.shape)]


def element_bytes(pointers: Any) -> int:
    """The size of what the pointers point at; Triton keeps a boolean in a byte."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)
