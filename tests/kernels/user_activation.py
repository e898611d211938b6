"""An activation as a user writes one, in a module of their own."""

import torch
import triton
import triton.language as tl


def bent(x: torch.Tensor) -> torch.Tensor:
    """x + x^2 / (1 + x^2)."""
    square = x * x
    return x + square / (1 + square)


def bent_derivative(x: torch.Tensor) -> torch.Tensor:
    """1 + 2x / (1 + x^2)^2."""
    wide = 1 + x * x
    return 1 + 2 * x / (wide * wide)


@triton.jit
def square_of(x):
    """A function of theirs that theirs call."""
    return tl.abs(x) * tl.abs(x)


@triton.jit
def triton_bent(x):
    """The same of a tile."""
    square = square_of(x)
    return x + square / (1 + square)


@triton.jit
def triton_bent_derivative(x):
    """The same of a tile."""
    wide = 1 + square_of(x)
    return 1 + 2 * x / (wide * wide)
