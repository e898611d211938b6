"""The contenders of one case: inputs that they share, what they have to equal, and the calls that are timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks.cases import Case, Contender
from benchmarks.checks import Built, Judge, Tensors, Verdict
from benchmarks.devices import Call
from benchmarks.layers import Layers
from benchmarks.operators import DTYPES, OF_GROUP, copies_of, find_operator
from benchmarks.providers import PROVIDERS
from benchmarks.work import Work, layer_work, operator_work
from graphmoe_kernels.cost import Sizes

# Of x, walked through turn by turn, so that no call finds its input in a cache.
INPUTS = 3


class Prepared(NamedTuple):
    """A contender that is ready to be checked and timed."""

    contender: Contender
    check: Callable[[], Verdict] | None  # what is wrong is not timed; None where nothing is computed
    call: Call  # what is timed
    calls: int = 1  # how many equal calls `call` makes
    work: Work | None = None  # of one of them, where the cost model has it
    capture: bool = False  # whether `call` is replayed as a CUDA graph
    # What is wrong with a result of the call that is timed, if anything: a graph could replay another.
    verify: Callable[[Any], str | None] | None = None
    units: int | None = None  # tokens made by one of the calls, for rates
    peak: int | None = None  # bytes that a call holds at most, where that was measured
    captured: bool = False  # whether `call` has become a replay


class Timing(Protocol):
    """What the contenders of one case share."""

    def prepare(self, contender: Contender) -> Prepared:
        """A contender ready to be checked and timed; it raises what building it raises."""


def call_of(built: Built, operands: Tensors, training: bool) -> Callable[[], Tensors]:
    """A forward, or in training a forward and a backward under random gradients."""
    if not training:
        return lambda: built.subject.results(operands)
    outputs = built.subject.results(operands)
    upstream = {name: torch.randn_like(t) for name, t in outputs.items() if t.is_floating_point()}
    return lambda: built.subject.results(operands, upstream)


def set_dropout(built: Built, rate: float) -> None:
    """Dropout on the input of every A of this package's adapters, which others have not."""
    adapters: Any = getattr(built.module, "lora_graphmoe", {})
    for adapter in adapters.values():
        adapter.config.lora_dropout = rate


class LayerTiming:
    """The contenders of a case of the groups ``layer``, ``step``, ``rounds``, ``methods``, ``scaling`` and ``host``.

    They are checked without dropout, whose masks no definition has, and timed with the case's.
    """

    def __init__(self, case: Case, layers: Layers) -> None:
        self.case, self.layers = case, layers
        self.training = case.mode == "training"
        self._inputs: dict[Sizes, tuple[list[Tensors], Judge]] = {}

    def prepare(self, contender: Contender) -> Prepared:
        """Raises what building a provider raises: out of memory, an option that a peer does not have."""
        provider, sizes = PROVIDERS[contender.provider], contender.sizes
        built = provider.build(self.layers.get(sizes), sizes)
        inputs, judge = self._input(sizes)
        built.set_mode(self.training)
        calls = [call_of(built, each, self.training) for each in inputs]

        def check() -> Verdict:
            found = judge.check(built)
            set_dropout(built, self.case.dropout)
            return found

        turns, captured = itertools.cycle(calls), self.case.graph and provider.capturable
        return Prepared(
            contender,
            check if provider.computes else None,
            # A graph reads one input for ever; the weights alone exceed the caches.
            calls[0] if captured else lambda: next(turns)(),
            work=layer_work(provider.form, sizes, self.training),
            capture=captured,
            verify=lambda found: judge.compare(built, found).fault,
        )

    def _input(self, sizes: Sizes) -> tuple[list[Tensors], Judge]:
        """The same at all rounds: routing is decided at the most rounds that the case has."""
        key, layer = replace(sizes, rounds=1), self.layers.get(sizes)
        if key not in self._inputs:
            most = max(c.sizes.rounds for c in self.case.contenders)
            x, rows = layer.input(replace(sizes, rounds=most))
            others = [{"x": layer.draw(sizes.tokens, seed=10 + i)} for i in range(INPUTS - 1)]
            judge = Judge({"x": x}, rows, self.training, layer.dtype)
            self._inputs[key] = [judge.operands, *others], judge
        return self._inputs[key]


class OperatorTiming:
    """The contenders of a case of an operator's group: providers are names of backends."""

    def __init__(self, case: Case, layers: Layers) -> None:
        self.case, device = case, layers.device
        self.sizes = case.contenders[0].sizes
        self.operator = find_operator(OF_GROUP[case.group], bool(case.later))
        operands = self.operator.operands(self.sizes, device.torch)
        self.judge = self.operator.judge(operands, DTYPES[self.sizes.dtype])
        self.copies, _ = copies_of(operands, device.l2_bytes)

    def prepare(self, contender: Contender) -> Prepared:
        """A call goes through all copies of the operands."""
        backend, training = contender.provider, self.case.mode == "training"
        sets = [self.operator.built(each, self.sizes.top_k, backend) for each in self.copies]
        own = self.judge.operands.keys()
        pairs = zip(sets, self.copies, strict=True)
        calls = [call_of(built, {name: each[name] for name in own}, training) for built, each in pairs]
        return Prepared(
            contender,
            lambda: self.judge.check(sets[0]),
            lambda: [call() for call in calls],
            calls=len(calls),
            work=operator_work(self.case.group, self.sizes, bool(self.case.later), training),
            # The experts on PyTorch ask the device how many tokens chose each of them.
            capture=self.case.graph and (backend == "triton" or self.case.group != "expert_swiglu"),
            verify=lambda found: self.judge.compare(sets[0], found[0], gradients=training).fault,
        )
