"""The GRU step and its backward as one kernel each.

A program computes BLOCK_M tokens x BLOCK_G columns. Only the candidate's product reads other columns than a program's
own; what that product reads (q * h, and the candidate's gradient) is formed again by every program of a token tile,
from tensors that are in the L2 cache by then. So no program waits for another, and one token's step runs on many
multiprocessors.
"""

import triton
import triton.language as tl

from graphmoe_kernels.triton_activations import tanh


@triton.jit
def _load(base, rows, columns, stride, inside):
    """A tile [rows, columns] in fp32, zero outside."""
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base, rows, columns, stride, inside, value):
    pointers = base + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _squash(x, TANH: tl.constexpr):
    """The candidate's activation."""
    if TANH:
        y = tanh(x)
    else:
        y = tl.sigmoid(x)
    return y


@triton.jit
def _slope(c, TANH: tl.constexpr):
    """The derivative of `_squash`, from its value."""
    if TANH:
        d = 1 - c * c
    else:
        d = c * (1 - c)
    return d


@triton.jit
def _place(tokens, width, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """Token tile (int64), rows and columns of this program, and which of these there are.

    The programs of a token tile are neighbours: they read the same rows.
    """
    column_tiles = tl.cdiv(width, BLOCK_G)
    program = tl.program_id(0)
    tile = (program // column_tiles).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program % column_tiles) * BLOCK_G + tl.arange(0, BLOCK_G)
    return tile, rows, columns, rows < tokens, columns < width


@triton.jit(do_not_specialize=["tokens"])
def gru_forward(
    inputs,  # [N, 3G]
    recurrent,  # [N, 2G]
    state,  # [N, G]
    total,  # [N, G]
    weight,  # [G, G]
    bias,  # [G]
    out,  # [N, 2G], contiguous
    candidate,  # [N, G] fp32, contiguous
    tokens,
    width,
    inputs_stride,
    recurrent_stride,
    state_stride,
    total_stride,
    weight_stride,
    TANH: tl.constexpr,
    HAS_STATE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h' and H + h' of `graphmoe_kernels.gru_step`, and c if SAVE."""
    _, rows, columns, row_inside, column_inside = _place(tokens, width, BLOCK_M, BLOCK_G)
    dtype = inputs.dtype.element_ty
    product = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)
    if HAS_STATE:
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_inside = k < width
            inside = row_inside[:, None] & k_inside[None, :]
            reset = _load(inputs + width, rows, k, inputs_stride, inside)
            reset += _load(recurrent + width, rows, k, recurrent_stride, inside)
            reset_state = tl.sigmoid(reset) * _load(state, rows, k, state_stride, inside)  # q * h
            w_pointers = weight + columns[None, :].to(tl.int64) * weight_stride + k[:, None]  # W_o, transposed
            w = tl.load(w_pointers, mask=k_inside[:, None] & column_inside[None, :], other=0.0)
            product = tl.dot(reset_state.to(dtype), w, product, input_precision="ieee")

    # Each part is stored as soon as it is there: with all of them alive a thread runs out of registers.
    inside = row_inside[:, None] & column_inside[None, :]
    product += _load(inputs + 2 * width, rows, columns, inputs_stride, inside)
    c = _squash(product + tl.load(bias + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :], TANH)
    if SAVE:
        _store(candidate, rows, columns, width, inside, c)
    update = _load(inputs, rows, columns, inputs_stride, inside)
    if HAS_STATE:
        z = tl.sigmoid(update + _load(recurrent, rows, columns, recurrent_stride, inside))
        new = (1 - z) * _load(state, rows, columns, state_stride, inside) + z * c
        _store(out, rows, columns, 2 * width, inside, new)
        new += _load(total, rows, columns, total_stride, inside)
    else:
        new = tl.sigmoid(update) * c
        _store(out, rows, columns, 2 * width, inside, new)
    _store(out + width, rows, columns, 2 * width, inside, new)


@triton.jit(do_not_specialize=["tokens"])
def gru_backward(
    grad,  # [N, 2G]
    inputs,  # [N, 3G]
    recurrent,  # [N, 2G]
    state,  # [N, G]
    candidate,  # [N, G] fp32, contiguous
    weight,  # [G, G]
    bias,  # [G]
    d_inputs,  # [N, 3G], contiguous
    d_state,  # [N, G], contiguous
    reset_state,  # [N, G], contiguous
    d_bias,  # [token tiles, G] fp32, contiguous: sums over the rows of each
    tokens,
    width,
    grad_stride,
    inputs_stride,
    recurrent_stride,
    state_stride,
    weight_stride,
    TANH: tl.constexpr,
    HAS_STATE: tl.constexpr,
    RESET_STATE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the inputs and, without the gates' part, of the state; q * h if RESET_STATE, the bias's if BIAS."""
    tile, rows, columns, row_inside, column_inside = _place(tokens, width, BLOCK_M, BLOCK_G)
    dtype = inputs.dtype.element_ty
    inside = row_inside[:, None] & column_inside[None, :]
    d_reset_state = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)  # of q * h
    if HAS_STATE:
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_inside = k < width
            k_tile = row_inside[:, None] & k_inside[None, :]
            d = _load(grad, rows, k, grad_stride, k_tile) + _load(grad + width, rows, k, grad_stride, k_tile)
            update = _load(inputs, rows, k, inputs_stride, k_tile)
            update += _load(recurrent, rows, k, recurrent_stride, k_tile)
            d *= tl.sigmoid(update) * _slope(_load(candidate, rows, k, width, k_tile), TANH)  # of the candidate
            w_pointers = weight + k[:, None].to(tl.int64) * weight_stride + columns[None, :]
            w = tl.load(w_pointers, mask=k_inside[:, None] & column_inside[None, :], other=0.0)
            d_reset_state = tl.dot(d.to(dtype), w, d_reset_state, input_precision="ieee")

    # Each part is stored as soon as it is there: with all of them alive a thread runs out of registers.
    if HAS_STATE:
        h = _load(state, rows, columns, state_stride, inside)
        reset = _load(inputs + width, rows, columns, inputs_stride, inside)
        q = tl.sigmoid(reset + _load(recurrent + width, rows, columns, recurrent_stride, inside))
        if RESET_STATE:
            _store(reset_state, rows, columns, width, inside, q * h)
        d_reset_state *= q
        _store(d_inputs + width, rows, columns, 3 * width, inside, d_reset_state * h * (1 - q))
        update = _load(inputs, rows, columns, inputs_stride, inside)
        z = tl.sigmoid(update + _load(recurrent, rows, columns, recurrent_stride, inside))
    else:
        _store(d_inputs + width, rows, columns, 3 * width, inside, d_reset_state)  # zero: no state to reset
        z = tl.sigmoid(_load(inputs, rows, columns, inputs_stride, inside))
    d = _load(grad, rows, columns, grad_stride, inside) + _load(grad + width, rows, columns, grad_stride, inside)
    if HAS_STATE:
        _store(d_state, rows, columns, width, inside, d * (1 - z) + d_reset_state)
        c = _load(candidate, rows, columns, width, inside)
    else:
        b = tl.load(bias + columns, mask=column_inside, other=0.0).to(tl.float32)
        c = _squash(_load(inputs + 2 * width, rows, columns, inputs_stride, inside) + b[None, :], TANH)
    d *= z
    d_candidate = d * _slope(c, TANH)
    _store(d_inputs + 2 * width, rows, columns, 3 * width, inside, d_candidate)
    if BIAS:  # of the fp32 values: terms cancel in the sum, and a rounding of each would not
        tl.store(d_bias + tile * width + columns, tl.sum(d_candidate, axis=0), mask=column_inside)
    if HAS_STATE:
        c -= h
    _store(d_inputs, rows, columns, 3 * width, inside, d * c * (1 - z))
