"""What a call would start on a device, in order, without the device and without computing anything.

Tensors on meta have shapes and no memory, and the kernels' launches stop before the device: so the real host code of a
layer of any size, forward and backward, runs in moments anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphmoe_kernels._ops import ops
from graphmoe_kernels.backend import standing_for
from graphmoe_kernels.launching import Launch, recorded, stubbed
from graphmoe_kernels.registration import followed_inside

# Products of two matrices, by the places of those among their arguments.
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "matmul": (0, 1)}
# What starts nothing on a device: it allocates or renames memory.
FREE = (
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
)
# What only writes.
FILLS = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "zero_", "fill_")


class Operation(NamedTuple):
    """An operation of PyTorch that starts work on the device.

    Attributes:
        name: the operation's, such as ``"mm"``.
        read, written: its tensors' bytes.
        product: rows, inner dimension and columns of a matrix product, with how many there are; None of others.
        sizes: every size of its tensors.
    """

    name: str
    read: int
    written: int
    product: tuple[int, int, int, int] | None
    sizes: frozenset[int]

    @property
    def operations(self) -> int:
        """Floating-point operations of its product; a multiply-add is two."""
        if self.product is None:
            return 0
        rows, inner, columns, count = self.product
        return 2 * rows * inner * columns * count


Step = Launch | Operation


class _Watch(TorchDispatchMode):
    """Enters every operation that starts something, and has our operators run what they run on a GPU."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._launches, self._taken = launches, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == ops.name:  # not the shapes alone, which is what tensors on meta are given
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        found = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            given = [] if name in FILLS else [value for key, value in kwargs.items() if key != "out"]
            read = [] if name in FILLS else [each for each in tree_leaves((args, given)) if isinstance(each, Tensor)]
            written = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
            sizes = frozenset(size for tensor in (*read, *written) for size in tensor.shape)
            self.catch_up().append(Operation(name, _bytes(read), _bytes(written), _product(name, args), sizes))
        return found

    def catch_up(self) -> list[Step]:
        """Enter the launches since it was called last, behind the operations before them."""
        self.steps += self._launches[self._taken :]
        self._taken = len(self._launches)
        return self.steps


def _product(name: str, args: Any) -> tuple[int, int, int, int] | None:
    if name not in PRODUCTS:
        return None
    a, b = (args[i] for i in PRODUCTS[name])
    return a.shape[-2], a.shape[-1], b.shape[-1], a.shape[0] if a.dim() == 3 else 1


def _bytes(tensors: list[Tensor]) -> int:
    """Of the memory that they have, however often it is repeated by strides of zero."""
    found = 0
    for tensor in tensors:
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        found += tensor.element_size() * math.prod(sizes) if tensor.numel() else 0
    return found


@contextmanager
def traced(device_class: str) -> Iterator[list[Step]]:
    """Enter what is started inside in the list that this yields: operations of PyTorch, and launches of our kernels.

    Tensors on meta stand for those of a GPU of ``device_class``. Host code that asks for a tensor's values
    (``.item()``) gets PyTorch's error. Without gradients the operators run as they do where nobody looks on.
    """
    with standing_for(device_class), stubbed(), followed_inside(), recorded() as launches:
        watch = _Watch(launches)
        with watch:
            yield watch.steps
        watch.catch_up()
