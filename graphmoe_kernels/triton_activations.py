"""The built-in activations as Triton functions, and what kernels do with an activation.

A kernel gets its activation as a constant, the tuple that `activations.triton_form` returns, and calls `activate` and
`differentiate`. The functions are written with exp, log and erf alone, which every target and the interpreter have;
``APPROXIMATE`` divides as fast as the device can, to about 2^-22, which the interpreter does not have.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def approximate_sigmoid(x):
    """1 / (1 + exp(-x)); an exp that overflows gives 0."""
    return libdevice.fast_dividef(1.0, 1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh by exp of a number below zero, which neither overflows nor cancels near one."""
    t = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, t - 1, 1 - t) / (1 + t)


@triton.jit
def tanh_derivative(x):
    t = tanh(x)
    return 1 - t * t


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_derivative(x):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def approximate_silu(x):
    return x * approximate_sigmoid(x)


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu_tanh_derivative(x):
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)


@triton.jit
def quick_gelu(x):
    return x * tl.sigmoid(1.702 * x)


@triton.jit
def quick_gelu_derivative(x):
    s = tl.sigmoid(1.702 * x)
    return s * (1 + 1.702 * x * (1 - s))


@triton.jit
def approximate_quick_gelu(x):
    return x * approximate_sigmoid(1.702 * x)


@triton.jit
def relu(x):
    return tl.where(x > 0, x, 0.0)


@triton.jit
def relu_derivative(x):
    return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def relu2(x):
    return tl.where(x > 0, x * x, 0.0)


@triton.jit
def relu2_derivative(x):
    return tl.where(x > 0, 2 * x, 0.0)


@triton.jit
def relu6(x):
    return tl.minimum(tl.maximum(x, 0.0), 6.0)


@triton.jit
def relu6_derivative(x):
    return tl.where((x > 0) & (x < 6), 1.0, 0.0)


@triton.jit
def leaky_relu(x):
    return tl.where(x > 0, x, 0.01 * x)


@triton.jit
def leaky_relu_derivative(x):
    return tl.where(x > 0, 1.0, 0.01)


@triton.jit
def hardswish(x):
    return x * tl.minimum(tl.maximum(x + 3, 0.0), 6.0) / 6


@triton.jit
def hardswish_derivative(x):
    return tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, (2 * x + 3) / 6))


@triton.jit
def mish(x):
    return x * tanh(softplus(x))


@triton.jit
def mish_derivative(x):
    t = tanh(softplus(x))
    return t + x * (1 - t * t) * tl.sigmoid(x)


@triton.jit
def sigmoid(x):
    return tl.sigmoid(x)


@triton.jit
def sigmoid_derivative(x):
    s = tl.sigmoid(x)
    return s * (1 - s)


@triton.jit
def linear(x):
    return x


@triton.jit
def linear_derivative(x):
    return x * 0 + 1


APPROXIMATIONS = {"silu": approximate_silu, "quick_gelu": approximate_quick_gelu, "sigmoid": approximate_sigmoid}


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr = False):
    """The activation's value for fp32 x of any shape."""
    if APPROXIMATE:
        y = ACTIVATION[2](x)
    else:
        y = ACTIVATION[0](x)
    return y


@triton.jit
def differentiate(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at fp32 x of any shape."""
    return ACTIVATION[1](x)
