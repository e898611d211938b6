"""The layer on a CUDA device, as the tests here need it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.checks import Built, Judge, Verdict, verdict
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

    def input(self, tokens: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """x [N, D] and the rows to check, whose routing is decided; with a ``seed`` any x."""
        x, rows = self.layer.input(replace(self.sizes, tokens=tokens))
        return (x, rows) if seed is None else (self.layer.draw(tokens, seed), rows)

    def leaves(self) -> dict[str, Tensor]:
        """The trainable tensors by name."""
        return trainable(self.layer.weights(self.sizes))

    def check(self, forward, module: nn.Module, x: Tensor, rows: Tensor, training: bool) -> Verdict:
        """Output and, in training, every gradient against fp64."""
        return Judge({"x": x}, rows, training, self.layer.dtype).check(self._built(forward, module))

    def check_single_tokens(self, forward, module: nn.Module, x: Tensor, training: bool) -> Verdict:
        """The same of a call for each token of x [N, D], judged by the norms over all calls together.

        One token's gradient may be a difference that nearly cancels (the router's, where routing weights are
        renormalised): the error of that token alone is a matter of luck, for the plain computation too.
        """
        built = self._built(forward, module)
        built.set_mode(training)
        row = torch.zeros(1, dtype=torch.int64, device=x.device)
        calls, floor = [], 0.0
        for token in x.split(1):
            judge = Judge({"x": token}, row, training, self.layer.dtype)
            plain, exact = judge.definitions(built)
            calls.append((built.subject.results(judge.operands, judge.upstream if training else None), plain, exact))
            floor = math.hypot(floor, judge.floor())
        together = ({name: torch.stack([call[i][name] for call in calls]) for name in calls[0][i]} for i in range(3))
        return verdict(*together, self.layer.dtype, floor)

    def _built(self, forward, module: nn.Module) -> Built:
        definitions = (self.layer.definition(self.sizes, exact) for exact in (False, True))
        return Built(over_tokens(forward, self.leaves()), module, "layer", *definitions)


def make(sizes: Sizes = SMALL, **changes: object) -> GPULayer:
    """A layer with `changes` of ``sizes`` (rounds, dtype, ...), on the device."""
    return GPULayer(replace(sizes, **changes))


def step(layer: GPULayer, forward, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of x and of every trainable tensor."""
    leaf = x.detach().requires_grad_()
    y = forward(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.leaves().values()], upstream)]


def free_gigabytes() -> float:
    """What the device has left."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 1e9
