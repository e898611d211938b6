"""The layer on a CUDA device, as the tests here need it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.devices import CudaDevice
from benchmarks.gpu.layers import Layer
from graphmoe_kernels.cost import Sizes

MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# No width is a multiple of a tile; the GRU's is padded.
SMALL = Sizes(hidden=264, intermediate=712, gru_width=26, experts=8, top_k=2, rank=16)


def make(sizes: Sizes = SMALL, **changes: object) -> Layer:
    """A layer with `changes` of ``sizes`` (rounds, dtype, ...), on the device."""
    return Layer(replace(sizes, **changes), CudaDevice())


def step(layer: Layer, forward, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x and of every trainable tensor."""
    leaf = x.detach().requires_grad_()
    y = forward(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.leaves().values()], upstream)]


def free_gigabytes() -> float:
    """What the device has left."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 1e9
