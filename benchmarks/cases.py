"""What is run: a layer of given sizes with its input, in inference or as a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.providers import Provider
from graphmoe_kernels import LayerWeights, RethinkingSpec
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.testing import cast_layer, make_layer, trainable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
MODES = ("inference", "training")


class Case(NamedTuple):
    """Sizes, and whether a call is a forward without gradients or a forward with its backward."""

    sizes: Sizes
    mode: str

    @property
    def name(self) -> str:
        return f"{self.mode}, T={self.sizes.rounds}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.sizes.dtype]

    @property
    def spec(self) -> RethinkingSpec:
        """alpha = 2r, as in the paper's Table 2."""
        return RethinkingSpec(self.sizes.rounds, self.sizes.top_k, scale=2.0)

    def problem(self) -> Problem:
        """The layer and its input, drawn from a fixed seed; without a GRU where there is one round."""
        s = self.sizes
        width = s.gru_width if s.rounds > 1 else None
        weights = make_layer(s.hidden, s.intermediate, s.experts, s.rank, width, dtype=self.dtype)
        generator = torch.Generator().manual_seed(1)
        x, grad_y = torch.randn(2, s.tokens, s.hidden, generator=generator).to(self.dtype).unbind()
        return Problem(weights, x, grad_y)


class Problem(NamedTuple):
    """A layer, its input x [N, D] and the gradient of its output [N, D]."""

    weights: LayerWeights
    x: Tensor
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype."""
        return Problem(cast_layer(self.weights, dtype), self.x.to(dtype), self.grad_y.to(dtype))

    def chunks(self, tokens: int) -> list[Problem]:
        """The same layer over ``tokens`` rows at a time."""
        parts = zip(self.x.split(tokens), self.grad_y.split(tokens), strict=True)
        return [self._replace(x=x, grad_y=grad_y) for x, grad_y in parts]


Call = Callable[[], dict[str, Tensor]]


def prepare(provider: Provider, case: Case, problem: Problem) -> Call:
    """The call that is timed, and whose result is judged: y, and in training the gradients by name."""
    weights = cast_layer(problem.weights, problem.x.dtype, requires_grad=case.mode == "training")
    forward = provider.prepare(weights, case.spec)
    if case.mode == "inference":

        def infer() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"y": forward(problem.x)}

        return infer

    leaves = {"x": problem.x.clone().requires_grad_(), **trainable(weights)}

    def train() -> dict[str, Tensor]:
        y = forward(leaves["x"])
        grads = torch.autograd.grad(y, list(leaves.values()), problem.grad_y)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    return train
