"""Kernels made for the compile inspector's own tests: one is fine, the others have one fault each."""

import os
from collections.abc import Iterator

import triton
import triton.language as tl

from graphmoe_kernels.aot.case import CompileCase


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, stride, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """c = a @ b for a of SIZE x STEPS*SIZE; fp32 is multiplied in full precision, which no HGMMA instruction does."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    result = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(STEPS):
        a = tl.load(a_ptr + rows * stride + step * SIZE + columns)
        b = tl.load(b_ptr + (step * SIZE + rows) * stride + columns)
        result = tl.dot(a, b, result, input_precision="ieee")
    tl.store(c_ptr + rows * stride + columns, result)


@triton.jit
def copy(x_ptr, out_ptr, SIZE: tl.constexpr):
    """out = x, without a matrix instruction."""
    lanes = tl.arange(0, SIZE)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes))


@triton.jit
def too_many_live_values(x_ptr, out_ptr, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """A sum of 256 numbers for each thread of one warp; a thread has 255 registers."""
    lanes = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for step in range(STEPS):
        total = total * 0.5 + tl.load(x_ptr + step * SIZE + lanes)
    tl.store(out_ptr + lanes, total)


@triton.jit
def does_not_compile(x_ptr, out_ptr, SIZE: tl.constexpr):
    """A block of a size that is no power of two."""
    lanes = tl.arange(0, SIZE)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes))


class CrashesTheCompiler:
    """Ends the process that asks for its arguments, as a failed assertion in a compiler does."""

    @property
    def arg_names(self) -> list[str]:
        os._exit(1)


def compile_cases(_configs: object) -> Iterator[CompileCase]:
    """The cases; they need no configurations."""

    def product(name: str, dtype: str, stages: int, size: int, steps: int) -> CompileCase:
        signature = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": "*fp32", "stride": "i32"}
        return CompileCase(name, matmul, signature, {"SIZE": size, "STEPS": steps}, 4, stages, True, ("stride",))

    def vector(name: str, kernel: object, num_warps: int, **constexprs: object) -> CompileCase:
        return CompileCase(name, kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, constexprs, num_warps, 2, False)

    yield vector("clean copy", copy, 4, SIZE=128)
    yield product("clean matmul", "bf16", stages=2, size=64, steps=8)
    yield product("faulty: no hgmma", "fp32", stages=2, size=32, steps=2)
    yield product("faulty: shared", "bf16", stages=6, size=128, steps=16)
    yield vector("faulty: spill", too_many_live_values, 1, SIZE=8192, STEPS=4)
    yield vector("faulty: size", does_not_compile, 4, SIZE=100)
    yield vector("faulty: crash", CrashesTheCompiler(), 4, SIZE=128)
