"""bfloat16 arithmetic, computed in float32 and rounded to nearest even.

NumPy has no bfloat16, and the stock interpreter keeps its bits in uint16. Loads, stores and the cast to float32 are
right; sums, products, comparisons, dot products and reductions work on the bits as on integers, and the cast from
float32 cuts instead of rounding. All of it is silent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# Operations on numbers whose result has the type of an operand. `binary_op`, `unary_op` and `ternary_op` are what the
# interpreter makes nearly all of them from.
ARITHMETIC = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf", "create_idiv")


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as the float32 numbers that they are; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 numbers as the bits of the nearest bfloat16, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), nearest).astype(np.uint16)


def is_bfloat16(handle: Any) -> bool:
    """Whether an interpreter's handle holds bfloat16 numbers (and not pointers to them)."""
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype == tl.bfloat16


def _widened(handle: Any) -> Any:
    return interpreter.TensorHandle(to_float32(handle.data), tl.float32) if is_bfloat16(handle) else handle


def _narrowed(handle: Any) -> Any:
    return interpreter.TensorHandle(to_bfloat16(handle.data), tl.bfloat16)


def _in_float32(operation: Callable) -> Callable:
    """The operation on float32 copies of bfloat16 operands, rounded back; a comparison's result stays boolean."""

    def repaired(self: Any, *operands: Any) -> Any:
        if not any(map(is_bfloat16, operands)):
            return operation(self, *operands)
        result = operation(self, *map(_widened, operands))
        return _narrowed(result) if result.data.dtype == np.float32 else result

    return repaired


def _repaired_dot(dot: Callable) -> Callable:
    """Operands in float32; the result has the accumulator's type."""

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        result = dot(self, _widened(a), _widened(b), _widened(accumulator), *rest)
        return _narrowed(result) if is_bfloat16(accumulator) else result

    return create_dot


def _cast(cast: Callable) -> Callable:
    """Casts from and to bfloat16 go through float32 (from float64 and int64 that rounds twice)."""

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == target.scalar or tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        source = _widened(source)
        if target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        return source if target.scalar == tl.float32 else cast(self, source, target)

    return cast_impl


def _cast_with_rounding(convert: Callable, cast_impl: Callable) -> Callable:
    """The same for casts that name a rounding; towards zero is what the stock interpreter does rightly."""

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        ours = tl.bfloat16 in (source.dtype.scalar, target.scalar) and rounding != interpreter._ir.ROUNDING_MODE.RTZ
        return cast_impl(self, source, target) if ours else convert(self, source, target, rounding)

    return create_fp_to_fp


def _repaired_reduction(apply: Callable) -> Callable:
    """Reductions and scans of bfloat16 tensors, in float32 and rounded once at the end."""

    def apply_impl(self: Any, tensors: tuple[Any, ...]) -> Any:
        narrow = [is_bfloat16(tensor.handle) for tensor in tensors]
        if not any(narrow):
            return apply(self, tensors)
        results = apply(
            self,
            tuple(
                self.to_tensor(_widened(t.handle).data, tl.float32) if n else t
                for t, n in zip(tensors, narrow, strict=True)
            ),
        )
        single = not isinstance(results, (list, tuple))
        results = [results] if single else list(results)
        for i, result in enumerate(results):
            if narrow[min(i, len(narrow) - 1)] and result.dtype == tl.float32:
                shape = result.handle.data.shape if result.type.is_block() else ()
                results[i] = self.to_tensor(to_bfloat16(result.handle.data).reshape(shape), tl.bfloat16)
        return results[0] if single else results

    return apply_impl


def repair() -> None:
    """Put the repairs into the interpreter's classes."""
    builder = interpreter.InterpreterBuilder
    for name in ARITHMETIC:
        setattr(builder, name, _in_float32(getattr(builder, name)))
    builder.create_dot = _repaired_dot(builder.create_dot)
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _cast_with_rounding(builder.create_fp_to_fp, builder.cast_impl)
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _repaired_reduction(operation.apply_impl)
