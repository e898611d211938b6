"""Products as accurate as in fp32 on matrix units that multiply bf16: a number as several of 8 bits.

One bf16 number holds itself, two hold an fp16 number and three an fp32 one, so all products of parts are exact in fp32.
Those that are 2^-24 of the largest, or less, are below the rounding of an fp32 product and left out.
"""

import triton
import triton.language as tl


@triton.jit
def parts(x):
    """The bf16 tensors that add up to x, the largest first."""
    if x.dtype == tl.bfloat16:
        found = (x,)
    else:
        wide = x.to(tl.float32)
        high = wide.to(tl.bfloat16)
        rest = wide - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        found = (high, middle)  # type: ignore[assignment]
        if x.dtype == tl.float32:
            found = (high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16))  # type: ignore[assignment]
    return found  # once: Triton 3.6 wants all returns of a function to be of one type


@triton.jit
def dot_of_parts(a, b):
    """The product of two matrices given as `parts`, [M, K] and [K, N]; the smallest products are added up first."""
    acc = tl.zeros([a[0].shape[0], b[0].shape[1]], tl.float32)
    for smaller in tl.static_range(2, -1, -1):  # times 2^-8
        for i in tl.static_range(len(a)):
            if smaller - i >= 0 and smaller - i < len(b):
                acc = tl.dot(a[i], b[smaller - i], acc)
    return acc
