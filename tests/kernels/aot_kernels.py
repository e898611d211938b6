"""Kernels made for the compile inspector's own tests: one is fine, the others have one fault each."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from graphmoe_kernels.aot.case import Variant
from graphmoe_kernels.launching import launch


@triton.jit
def matmul(a, b, c, stride, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """c = a @ b for a of SIZE x STEPS*SIZE; fp32 is multiplied in full precision, which no HGMMA instruction does."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    result = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(STEPS):
        left = tl.load(a + rows * stride + step * SIZE + columns)
        right = tl.load(b + (step * SIZE + rows) * stride + columns)
        result = tl.dot(left, right, result, input_precision="ieee")
    tl.store(c + rows * stride + columns, result)


@triton.jit
def copy(x, out, SIZE: tl.constexpr):
    """out = x, without a matrix instruction."""
    lanes = tl.arange(0, SIZE)
    tl.store(out + lanes, tl.load(x + lanes))


@triton.jit
def too_many_live_values(x, out, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """A sum of 256 numbers for each thread of one warp; a thread has 255 registers."""
    lanes = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for step in range(STEPS):
        total = total * 0.5 + tl.load(x + step * SIZE + lanes)
    tl.store(out + lanes, total)


@triton.jit
def does_not_compile(x, out, SIZE: tl.constexpr):
    """A block of a size that is no power of two."""
    lanes = tl.arange(0, SIZE)
    tl.store(out + lanes, tl.load(x + lanes))


class CrashesTheCompiler:
    """Ends the process that compiles it, as a failed assertion in a compiler does."""

    __name__ = "crash"
    arg_names = ("x", "out", "SIZE")

    def run(self, **_: Any) -> None:
        os._exit(1)


def product(dtype: torch.dtype, stages: int, size: int, steps: int) -> None:
    """a @ b by `matmul`, whose rows are a multiple of 16 apart."""
    a, b = (torch.empty(size * steps, size * steps, dtype=dtype, device="meta") for _ in range(2))
    out = torch.empty(size, size, device="meta")
    options = {"SIZE": size, "STEPS": steps, "num_warps": 4, "num_stages": stages}
    launch(matmul, (1,), a, b, out, size * steps, device=a.device, **options)


def vector(kernel: Any, num_warps: int, **constants: int) -> None:
    """A kernel from one vector to another."""
    x, out = torch.empty(2**16, device="meta"), torch.empty(2**16, device="meta")
    launch(kernel, (1,), x, out, device=x.device, **constants, num_warps=num_warps, num_stages=2)


def variants() -> Iterator[Variant]:
    """The calls, each with one launch."""
    bf16, fp32 = torch.bfloat16, torch.float32
    yield Variant("clean", partial(vector, copy, 4, SIZE=128))
    yield Variant("clean", partial(product, bf16, 2, 64, 8), ("matmul",))
    yield Variant("faulty: no hgmma", partial(product, fp32, 2, 32, 2), ("matmul",))
    yield Variant("faulty: shared", partial(product, bf16, 6, 128, 16), ("matmul",))
    yield Variant("faulty: spill", partial(vector, too_many_live_values, 1, SIZE=8192, STEPS=4))
    yield Variant("faulty: size", partial(vector, does_not_compile, 4, SIZE=100))
    yield Variant("faulty: crash", partial(vector, CrashesTheCompiler(), 4, SIZE=128))
