"""The layer on a CUDA device, as the tests here need it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.checks import Built, Judge, Verdict
from benchmarks.devices import CudaDevice
from benchmarks.layers import Layer, over_tokens
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.testing import trainable
from graphmoe_model import FusedGraphMoEFFN

MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# No width is a multiple of a tile; the GRU's is padded.
SMALL = Sizes(hidden=264, intermediate=712, gru_width=26, experts=8, top_k=2, rank=16)


class GPULayer:
    """A layer at some sizes with the checks that let it be timed.

    Attributes:
        fused: this package's layer on Triton.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.layer = sizes, Layer(sizes, CudaDevice())
        self.adapter = self.layer.adapter
        self.fused = self.sharing("auto", "triton")

    def sharing(self, fold: str, backend: str) -> FusedGraphMoEFFN:
        """A layer of other settings over the same parameters."""
        return self.layer.ffn(self.sizes, fold, backend)

    def input(self, tokens: int, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, D] and the rows to check, whose routing is decided; with a ``seed`` any x."""
        x, rows = self.layer.input(replace(self.sizes, tokens=tokens))
        return (x, rows) if seed is None else (self.layer.draw(tokens, seed), rows)

    def leaves(self) -> dict[str, torch.Tensor]:
        """The trainable tensors by name."""
        return trainable(self.layer.weights(self.sizes))

    def check(self, forward, module: nn.Module, x: torch.Tensor, rows: torch.Tensor, training: bool) -> Verdict:
        """Output and, in training, every gradient against fp64."""
        definitions = (self.layer.definition(self.sizes, exact) for exact in (False, True))
        built = Built(over_tokens(forward, self.leaves()), module, "layer", *definitions)
        return Judge({"x": x}, rows, training, self.layer.dtype).check(built)


def make(sizes: Sizes = SMALL, **changes: object) -> GPULayer:
    """A layer with `changes` of ``sizes`` (rounds, dtype, ...), on the device."""
    return GPULayer(replace(sizes, **changes))


def step(layer: GPULayer, forward, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of x and of every trainable tensor."""
    leaf = x.detach().requires_grad_()
    y = forward(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.leaves().values()], upstream)]


def free_gigabytes() -> float:
    """What the device has left."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 1e9
