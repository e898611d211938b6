"""An operator's backends in one case: operands, checks against fp64, and the calls that are timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case, Contender
from benchmarks.checks import check_operator
from benchmarks.layers import DTYPES
from benchmarks.operators import OPERATORS, Operands, Operator, forward_only, gradients, with_order
from benchmarks.preparation import Prepared
from benchmarks.work import operator_work
from benchmarks.workplace import Workplace

# Sets of operands that a turn walks through, so that together they exceed the L2 cache by half.
MAX_COPIES = 512
COLD_FACTOR = 1.5
NAMES = {"routing": "routing", "expert_swiglu": "experts", "gru_step": "gru"}


def copies_for(operands: Operands, l2_bytes: int) -> int:
    """How many sets of operands exceed the L2 cache by half; at least two, at most `MAX_COPIES`."""
    size = sum(t.numel() * t.element_size() for t in operands.values())
    return max(2, min(MAX_COPIES, math.ceil(COLD_FACTOR * l2_bytes / max(size, 1))))


class OperatorTiming:
    """The contenders of a case of an operator's group: providers are names of backends."""

    def __init__(self, case: Case, workplace: Workplace) -> None:
        self.case, device = case, workplace.device
        self.sizes = case.contenders[0].sizes
        self.dtype = DTYPES[self.sizes.dtype]
        self.operator = find_operator(NAMES[case.group], bool(case.later))
        self.operands = self.operator.operands(self.sizes, bool(case.later), self.dtype, device.torch)
        copies = copies_for(self.operands, device.l2_bytes)
        self.copies = [{name: t.clone() for name, t in self.operands.items()} for _ in range(copies)]

    def prepare(self, contender: Contender) -> Prepared:
        """A call goes through all copies of the operands."""
        backend, training = contender.provider, self.case.mode == "training"
        ordered = backend == "triton"  # the layer makes an order for the Triton kernels alone
        sets = [with_order(self.operator, each) if ordered else each for each in self.copies]
        one: Callable[[Operands], object] = partial(forward_only, self.operator, backend=backend)
        if training:
            upstream = {
                name: torch.randn_like(t)
                for name, t in self.operator.run(self.operands, backend).items()
                if t.is_floating_point()
            }
            one = partial(gradients, self.operator, backend=backend, upstream=upstream)

        def verify(result: Any) -> str | None:
            again = one(sets[0])
            assert isinstance(again, dict)
            differ = [name for name, t in again.items() if not torch.equal(result[0][name], t)]
            return f"{', '.join(differ)} differs from that of the call itself" if differ else None

        return Prepared(
            contender,
            lambda: check_operator(self.operator, sets[0], self.dtype, backend),
            lambda: [one(each) for each in sets],
            calls=len(sets),
            work=operator_work(self.case.group, self.sizes, bool(self.case.later), training),
            # The experts on PyTorch ask the device how many tokens chose each of them.
            capture=self.case.graph and (backend == "triton" or self.case.group != "expert_swiglu"),
            verify=verify,
        )


def find_operator(name: str, later: bool) -> Operator:
    """One of `OPERATORS`."""
    return next(operator for operator in OPERATORS if operator.name == name and operator.later == later)
