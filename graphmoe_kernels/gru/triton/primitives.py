"""What both GRU kernels share: a program's tile, its loads and stores, and the candidate's activation."""

import triton
import triton.language as tl

from graphmoe_kernels.triton_activations import tanh


@triton.jit
def load_tile(base, rows, columns, stride, inside):
    """A tile [rows, columns] in fp32, zero outside."""
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(base, rows, columns, stride, inside, value):
    """The tile [rows, columns] in the tensor's dtype."""
    pointers = base + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def squash(x, TANH: tl.constexpr):
    """The candidate's activation."""
    if TANH:
        y = tanh(x)
    else:
        y = tl.sigmoid(x)
    return y


@triton.jit
def slope(c, TANH: tl.constexpr):
    """The derivative of `squash`, from its value."""
    if TANH:
        d = 1 - c * c
    else:
        d = c * (1 - c)
    return d


@triton.jit
def place(num_tokens, width, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """Token tile (int64), rows and columns of this program, and which of these there are.

    The programs of a token tile are neighbours: they read the same rows.
    """
    column_tiles = tl.cdiv(width, BLOCK_G)
    program = tl.program_id(0)
    tile = (program // column_tiles).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program % column_tiles) * BLOCK_G + tl.arange(0, BLOCK_G)
    return tile, rows, columns, rows < num_tokens, columns < width
