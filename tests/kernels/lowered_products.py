"""Matrix products that read fewer bits of fp32 numbers, as GPUs' and some CPUs' do on request, on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BITS = {"high": 13, "medium": 16}  # of an fp32 number's 24 that a product leaves out: TF32, bf16


class Lowered(TorchDispatchMode):
    """Matrix products that read fewer bits of their fp32 operands, on a machine whose own read all."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.seen = bits, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[2] in self.PRODUCTS:
            self.seen += 1
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return func(*args, **(kwargs or {}))

    def rounded(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or self.bits == 0:
            return x
        half = 1 << (self.bits - 1)
        return ((x.contiguous().view(torch.int32) + half) & ~((1 << self.bits) - 1)).view(torch.float32)


@contextmanager
def precision(setting: str) -> Iterator[Lowered]:
    """The setting, and products that obey it."""
    torch.set_float32_matmul_precision(setting)
    try:
        with Lowered(BITS[setting]) as mode:
            yield mode
    finally:
        torch.set_float32_matmul_precision("highest")
