"""The backward of the GRU step as one kernel, cut as the forward is."""

import triton
import triton.language as tl

from graphmoe_kernels.gru.triton.primitives import load_tile, place, slope, squash, store_tile


@triton.jit(do_not_specialize=["num_tokens"])
def gru_backward(
    grad,  # [N, 2G]
    inputs,  # [N, 3G]
    recurrent,  # [N, 2G], or None in the first round
    state,  # [N, G], or None
    candidate,  # [N, G] fp32, contiguous, or None
    weight,  # [G, G]
    bias,  # [G]
    d_inputs,  # [N, 3G], contiguous
    d_state,  # [N, G], contiguous, or None in the first round
    reset_state,  # [N, G], contiguous, or None
    d_bias,  # [token tiles, G] fp32, contiguous: sums over the rows of each; or None
    num_tokens,
    width,
    stride_grad,
    stride_inputs,
    stride_recurrent,
    stride_state,
    stride_weight,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the inputs and, without the gates' part, of the state; q * h and the bias's where asked for."""
    tile, rows, columns, row_inside, column_inside = place(num_tokens, width, BLOCK_M, BLOCK_G)
    dtype = inputs.dtype.element_ty
    inside = row_inside[:, None] & column_inside[None, :]
    d_reset_state = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)  # of q * h
    if state is not None:
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_inside = k < width
            k_tile = row_inside[:, None] & k_inside[None, :]
            d = load_tile(grad, rows, k, stride_grad, k_tile) + load_tile(grad + width, rows, k, stride_grad, k_tile)
            update = load_tile(inputs, rows, k, stride_inputs, k_tile)
            update += load_tile(recurrent, rows, k, stride_recurrent, k_tile)
            d *= tl.sigmoid(update) * slope(load_tile(candidate, rows, k, width, k_tile), TANH)  # of the candidate
            w_pointers = weight + k[:, None].to(tl.int64) * stride_weight + columns[None, :]
            w = tl.load(w_pointers, mask=k_inside[:, None] & column_inside[None, :], other=0.0)
            d_reset_state = tl.dot(d.to(dtype), w, d_reset_state, input_precision="ieee")

    # Each part is stored as soon as it is there: with all of them alive a thread runs out of registers.
    if state is not None:
        h = load_tile(state, rows, columns, stride_state, inside)
        reset = load_tile(inputs + width, rows, columns, stride_inputs, inside)
        q = tl.sigmoid(reset + load_tile(recurrent + width, rows, columns, stride_recurrent, inside))
        if reset_state is not None:
            store_tile(reset_state, rows, columns, width, inside, q * h)
        d_reset_state *= q
        store_tile(d_inputs + width, rows, columns, 3 * width, inside, d_reset_state * h * (1 - q))
        update = load_tile(inputs, rows, columns, stride_inputs, inside)
        z = tl.sigmoid(update + load_tile(recurrent, rows, columns, stride_recurrent, inside))
    else:
        store_tile(d_inputs + width, rows, columns, 3 * width, inside, d_reset_state)  # zero: no state to reset
        z = tl.sigmoid(load_tile(inputs, rows, columns, stride_inputs, inside))
    d = load_tile(grad, rows, columns, stride_grad, inside) + load_tile(
        grad + width, rows, columns, stride_grad, inside
    )
    if state is not None:
        store_tile(d_state, rows, columns, width, inside, d * (1 - z) + d_reset_state)
        c = load_tile(candidate, rows, columns, width, inside)
    else:
        b = tl.load(bias + columns, mask=column_inside, other=0.0).to(tl.float32)
        c = squash(load_tile(inputs + 2 * width, rows, columns, stride_inputs, inside) + b[None, :], TANH)
    d *= z
    d_candidate = d * slope(c, TANH)
    store_tile(d_inputs + 2 * width, rows, columns, 3 * width, inside, d_candidate)
    if d_bias is not None:  # of the fp32 values: terms cancel in the sum, and a rounding of each would not
        tl.store(d_bias + tile * width + columns, tl.sum(d_candidate, axis=0), mask=column_inside)
    if state is not None:
        c -= h
    store_tile(d_inputs, rows, columns, 3 * width, inside, d * c * (1 - z))
