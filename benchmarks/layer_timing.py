"""A layer's contenders in one case: inputs, checks against fp64, and the calls that are timed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Contender
from benchmarks.checks import Verdict, verdict
from benchmarks.devices import Call
from benchmarks.layers import DTYPES, Layer
from benchmarks.operators import Outputs
from benchmarks.preparation import Prepared
from benchmarks.providers import PROVIDERS, Built
from benchmarks.work import layer_work
from benchmarks.workplace import Workplace
from graphmoe_kernels.cost import Sizes

# Of x, walked through turn by turn, so that no call finds its input in a cache.
INPUTS = 3


class Sample(NamedTuple):
    """The rows of x that are checked, and the gradient of y there."""

    x: Tensor
    rows: Tensor
    upstream: Tensor


class Judge:
    """Checks providers on a sample of tokens; what several of them have to equal is computed once.

    Args:
        training: whether gradients are checked too.
        dtype: of the layer.
    """

    def __init__(self, training: bool, dtype: torch.dtype) -> None:
        self.training, self.dtype = training, dtype
        self._known: dict[str, tuple[Outputs, Outputs]] = {}

    def sample(self, x: Tensor, rows: Tensor) -> Sample:
        """Of x [N, D], with random gradients from a fixed seed."""
        generator = torch.Generator(x.device).manual_seed(7)
        upstream = torch.randn(len(rows), x.shape[1], generator=generator, device=x.device)
        return Sample(x, rows, upstream.to(x.dtype))

    def check(self, built: Built, sample: Sample) -> Verdict:
        """Output on the sampled rows and, in training, every gradient of a loss over them, against fp64."""
        x, rows, upstream = sample
        built.set_mode(self.training)
        wide = torch.zeros_like(x).index_copy_(0, rows, upstream)
        found = built.subject.results(x, wide, self.training)
        return self.compare(built, sample, {n: t[rows] if n in ("y", "x") else t for n, t in found.items()})

    def compare(self, built: Built, sample: Sample, found: Outputs) -> Verdict:
        """Results at the sampled rows, however they were computed."""
        plain, exact = self.definitions(built, sample)
        # A gradient that is zero in real arithmetic is judged by its absolute error.
        floor = 1e-3 * torch.linalg.vector_norm(sample.upstream.double()).item() if self.training else 0.0
        return verdict(found, plain, exact, self.dtype, floor)

    def definitions(self, built: Built, sample: Sample) -> tuple[Outputs, Outputs]:
        """What ``built`` has to equal at the sampled rows, in the layer's dtype and in fp64."""
        if built.definition not in self._known:
            x, upstream = sample.x[sample.rows], sample.upstream
            plain = built.plain.results(x, upstream, self.training)
            self._known[built.definition] = plain, built.exact.results(x.double(), upstream.double(), self.training)
        return self._known[built.definition]


class LayerTiming:
    """The contenders of a case of the groups ``layer``, ``rounds``, ``methods`` and ``scaling``."""

    def __init__(self, case: Case, workplace: Workplace) -> None:
        self.case, self.workplace = case, workplace
        self.training = case.mode == "training"
        self.judge = Judge(self.training, DTYPES[case.contenders[0].sizes.dtype])
        self._inputs: dict[Sizes, tuple[list[Tensor], Sample]] = {}

    def prepare(self, contender: Contender) -> Prepared:
        """Raises what building a provider raises: out of memory, an option that a peer does not have."""
        provider, sizes = PROVIDERS[contender.provider], contender.sizes
        layer = self.workplace.layer(sizes)
        built = provider.build(layer, sizes)
        inputs, sample = self._input(layer, sizes)
        calls = [self._call(built, x) for x in inputs]
        turns, captured = itertools.cycle(calls), self.case.graph and provider.capturable

        def verify(result: object) -> str | None:
            assert isinstance(result, Tensor)
            return self.judge.compare(built, sample, {"y": result[sample.rows]}).fault

        return Prepared(
            contender,
            lambda: self.judge.check(built, sample),
            # A graph reads one input for ever; the weights alone exceed the caches.
            calls[0] if captured else lambda: next(turns)(),
            work=layer_work(provider.form, sizes, self.training),
            capture=captured,
            verify=verify if captured else None,
        )

    def _input(self, layer: Layer, sizes: Sizes) -> tuple[list[Tensor], Sample]:
        """The same at all rounds: routing is decided at the most rounds that the case has."""
        key = replace(sizes, rounds=1)
        if key not in self._inputs:
            most = max(c.sizes.rounds for c in self.case.contenders)
            x, rows = layer.input(replace(sizes, rounds=most))
            others = [layer.draw(sizes.tokens, seed=10 + i) for i in range(INPUTS - 1)]
            self._inputs[key] = [x, *others], self.judge.sample(x, rows)
        return self._inputs[key]

    def _call(self, built: Built, x: Tensor) -> Call:
        if self.training:
            upstream = torch.randn_like(x)
            leaves = list(built.subject.leaves.values())

            def train() -> object:
                leaf = x.detach().requires_grad_()
                y = built.subject.forward(leaf)
                return torch.autograd.grad(y, [leaf, *leaves], upstream, allow_unused=True)

            return train

        def infer() -> Tensor:
            with torch.no_grad():
                return built.subject.forward(x)

        return infer
