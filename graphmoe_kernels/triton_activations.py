"""The activations of `graphmoe_kernels.ACTIVATIONS` as Triton functions: values and derivatives, in fp32.

Written with exp, log and erf alone, which every target and the interpreter have; `activate` with APPROXIMATE divides as
fast as the device can, to about 2^-22, which the interpreter does not have.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The names that `activate` and `differentiate` know; a registered activation of the user's runs on PyTorch only.
NAMES = (
    "silu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "leaky_relu",
    "hardswish",
    "mish",
    "sigmoid",
    "tanh",
    "linear",
)


@triton.jit
def tanh(x):
    """tanh by exp of a number below zero, which neither overflows nor cancels near one."""
    t = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, t - 1, 1 - t) / (1 + t)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x, APPROXIMATE: tl.constexpr):
    """1 / (1 + exp(-x)); an exp that overflows gives 0."""
    if APPROXIMATE:
        return libdevice.fast_dividef(1.0, 1 + tl.exp(-x))
    else:
        return tl.sigmoid(x)


@triton.jit
def activate(x, NAME: tl.constexpr, APPROXIMATE: tl.constexpr = False):
    """The activation's value for fp32 x of any shape."""
    if NAME == "silu":
        y = x * sigmoid(x, APPROXIMATE)
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "quick_gelu":
        y = x * sigmoid(1.702 * x, APPROXIMATE)
    elif NAME == "relu":
        y = tl.where(x > 0, x, 0.0)
    elif NAME == "relu2":
        y = tl.where(x > 0, x * x, 0.0)
    elif NAME == "relu6":
        y = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif NAME == "leaky_relu":
        y = tl.where(x > 0, x, 0.01 * x)
    elif NAME == "hardswish":
        y = x * tl.minimum(tl.maximum(x + 3, 0.0), 6.0) / 6
    elif NAME == "mish":
        y = x * tanh(softplus(x))
    elif NAME == "sigmoid":
        y = sigmoid(x, APPROXIMATE)
    elif NAME == "tanh":
        y = tanh(x)
    else:
        tl.static_assert(NAME == "linear", "unknown activation")
        y = x
    return y


@triton.jit
def differentiate(x, NAME: tl.constexpr):
    """The activation's derivative at fp32 x of any shape."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        d = s * (1 + x * (1 - s))
    elif NAME == "gelu":
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        d = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    elif NAME == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        d = s * (1 + 1.702 * x * (1 - s))
    elif NAME == "relu":
        d = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        d = tl.where(x > 0, 2 * x, 0.0)
    elif NAME == "relu6":
        d = tl.where((x > 0) & (x < 6), 1.0, 0.0)
    elif NAME == "leaky_relu":
        d = tl.where(x > 0, 1.0, 0.01)
    elif NAME == "hardswish":
        d = tl.where(x < -3, 0.0, tl.where(x > 3, 1.0, (2 * x + 3) / 6))
    elif NAME == "mish":
        t = tanh(softplus(x))
        d = t + x * (1 - t * t) * tl.sigmoid(x)
    elif NAME == "sigmoid":
        s = tl.sigmoid(x)
        d = s * (1 - s)
    elif NAME == "tanh":
        t = tanh(x)
        d = 1 - t * t
    else:
        tl.static_assert(NAME == "linear", "unknown activation")
        d = x * 0 + 1
    return d
