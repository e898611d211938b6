"""Kernels broken on purpose, one fault each, and beside them the form that is right."""

import triton
import triton.language as tl


@triton.jit
def double(x_ptr, out_ptr, size, MASKED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """out = 2 x. Without the mask the last program runs past the end; with SHIFT it reads its neighbours."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size if MASKED else offsets >= 0
    tl.store(out_ptr + offsets, 2 * tl.load(x_ptr + offsets + SHIFT, mask=mask, other=0.0), mask=mask)


@triton.jit
def total(x_ptr, out_ptr, size, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of x, right only if the masked lanes are zero."""
    offsets = tl.arange(0, BLOCK)
    if OTHER:
        x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
    else:
        x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(out_ptr, tl.sum(x, axis=0))


@triton.jit
def overlapping_stores(out_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Every program stores BLOCK elements; with STEP < BLOCK they overlap."""
    offsets = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.zeros((BLOCK,), tl.float32) + 1.0)


@triton.jit
def running_sum(out_ptr):
    """out[i + 1] = out[i] + 1 with one program for each element: right only if the programs run in order."""
    i = tl.program_id(0)
    tl.store(out_ptr + i + 1, tl.load(out_ptr + i) + 1.0)


@triton.jit
def mirrored(x_ptr, scratch_ptr, out_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """out = x backwards, by way of memory: each thread loads what another one stored."""
    lanes = tl.arange(0, BLOCK)
    tl.store(scratch_ptr + lanes, tl.load(x_ptr + lanes))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + lanes, tl.load(scratch_ptr + BLOCK - 1 - lanes))


@triton.jit
def lanes_collide(out_ptr, BLOCK: tl.constexpr):
    """All lanes store their own number to one address."""
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes * 0, lanes.to(tl.float32))


@triton.jit
def last_arriver(
    x_ptr,
    partial_ptr,
    counter_ptr,
    out_ptr,
    BARRIER: tl.constexpr,
    ATOMIC_FIRST: tl.constexpr,
    SEM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of x's PARTS rows, added up by the program that arrives last."""
    part, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    arrived = 0
    if ATOMIC_FIRST:
        arrived = tl.atomic_add(counter_ptr, 1, sem=SEM)
    tl.store(partial_ptr + part * BLOCK + lanes, 2 * tl.load(x_ptr + part * BLOCK + lanes))
    if BARRIER:
        tl.debug_barrier()
    if not ATOMIC_FIRST:
        arrived = tl.atomic_add(counter_ptr, 1, sem=SEM)
    if arrived == PARTS - 1:
        result = tl.zeros((BLOCK,), tl.float32)
        for i in range(PARTS):
            result += tl.load(partial_ptr + i * BLOCK + lanes)
        tl.store(out_ptr + lanes, result)
        tl.store(counter_ptr, 0)


@triton.jit
def arrival_order(counter_ptr, out_ptr):
    """out[i] = the number of programs that came before program i."""
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


@triton.jit
def elementwise(x_ptr, y_ptr, sum_ptr, quotient_ptr, rounded_ptr, wide_ptr, larger_ptr, BLOCK: tl.constexpr):
    """Arithmetic, comparison and casts in the dtype of x and y."""
    lanes = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + lanes), tl.load(y_ptr + lanes)
    tl.store(sum_ptr + lanes, x + y)
    tl.store(quotient_ptr + lanes, (x.to(tl.float32) / y).to(quotient_ptr.dtype.element_ty))
    tl.store(rounded_ptr + lanes, tl.load(wide_ptr + lanes).to(rounded_ptr.dtype.element_ty))
    tl.store(larger_ptr + lanes, tl.where(x > y, x, tl.maximum(-x, y)))


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, total_ptr, SIZE: tl.constexpr):
    """c = a @ b for square tiles, and the row sums of a."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + rows * SIZE + columns), tl.load(b_ptr + rows * SIZE + columns)
    tl.store(c_ptr + rows * SIZE + columns, tl.dot(a, b))
    tl.store(total_ptr + tl.arange(0, SIZE), tl.sum(a, axis=1))
