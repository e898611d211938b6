"""The GRU step as one kernel.

A program computes BLOCK_M tokens x BLOCK_G columns. Only the candidate's product reads other columns than a program's
own; what that product reads (q * h, and in the backward the candidate's gradient) is formed again by every program of a
token tile, from tensors that are in the L2 cache by then. So no program waits for another, and one token's step runs on
many multiprocessors.
"""

import triton
import triton.language as tl

from graphmoe_kernels.gru.triton.primitives import load_tile, place, squash, store_tile


@triton.jit(do_not_specialize=["num_tokens"])
def gru_forward(
    inputs,  # [N, 3G]
    recurrent,  # [N, 2G], or None in the first round
    state,  # [N, G], or None
    total,  # [N, G], or None
    weight,  # [G, G]
    bias,  # [G]
    out,  # [N, 2G], contiguous
    candidate,  # [N, G] fp32, contiguous, or None
    num_tokens,
    width,
    stride_inputs,
    stride_recurrent,
    stride_state,
    stride_total,
    stride_weight,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h' and H + h' of `graphmoe_kernels.gru_step`, and c where there is room for it."""
    _, rows, columns, row_inside, column_inside = place(num_tokens, width, BLOCK_M, BLOCK_G)
    dtype = inputs.dtype.element_ty
    product = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)
    if state is not None:
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_inside = k < width
            inside = row_inside[:, None] & k_inside[None, :]
            reset = load_tile(inputs + width, rows, k, stride_inputs, inside)
            reset += load_tile(recurrent + width, rows, k, stride_recurrent, inside)
            reset_state = tl.sigmoid(reset) * load_tile(state, rows, k, stride_state, inside)  # q * h
            w_pointers = weight + columns[None, :].to(tl.int64) * stride_weight + k[:, None]  # W_o, transposed
            w = tl.load(w_pointers, mask=k_inside[:, None] & column_inside[None, :], other=0.0)
            product = tl.dot(reset_state.to(dtype), w, product, input_precision="ieee")

    # Each part is stored as soon as it is there: with all of them alive a thread runs out of registers.
    inside = row_inside[:, None] & column_inside[None, :]
    product += load_tile(inputs + 2 * width, rows, columns, stride_inputs, inside)
    c = squash(product + tl.load(bias + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :], TANH)
    if candidate is not None:
        store_tile(candidate, rows, columns, width, inside, c)
    update = load_tile(inputs, rows, columns, stride_inputs, inside)
    if state is not None:
        z = tl.sigmoid(update + load_tile(recurrent, rows, columns, stride_recurrent, inside))
        new = (1 - z) * load_tile(state, rows, columns, stride_state, inside) + z * c
        store_tile(out, rows, columns, 2 * width, inside, new)
        new += load_tile(total, rows, columns, stride_total, inside)
    else:
        new = tl.sigmoid(update) * c
        store_tile(out, rows, columns, 2 * width, inside, new)
    store_tile(out + width, rows, columns, 2 * width, inside, new)
