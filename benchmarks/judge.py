"""Who may be timed: a provider whose result keeps the error budget against the fp64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Call, Case, Problem, prepare
from benchmarks.providers import PROVIDERS
from graphmoe_kernels import rethink_reference
from graphmoe_kernels.testing import relative_error, within_budget

# Of the reference, which gathers weights per token: 32 tokens bound its memory. Algorithm 1 runs every expert on every
# token in fp64: a few tokens are enough to anchor the oracle.
CHUNK_TOKENS = 32
ANCHOR_TOKENS = 8
ANCHOR_ERROR = 1e-11


class Judge:
    """The oracle of one problem, and the error that the plain computation makes in the problem's dtype.

    The oracle is the reference implementation in fp64 on the same (rounded) values; a few of its tokens are themselves
    checked against Algorithm 1 as the paper has it.
    """

    def __init__(self, case: Case, problem: Problem) -> None:
        self.case = case
        exact = problem.to(torch.float64)
        self.oracle = _reference(case, exact)
        anchor = rethink_reference(exact.x[:ANCHOR_TOKENS], exact.weights, case.spec)
        if (error := relative_error(self.oracle["y"][:ANCHOR_TOKENS], anchor)) > ANCHOR_ERROR:
            raise AssertionError(f"the oracle differs from Algorithm 1 by {error:.1e}: nothing can be judged by it")
        literal = _reference(case, problem)
        self.literal_errors = {name: relative_error(literal[name], self.oracle[name]) for name in self.oracle}

    def verdict(self, call: Call) -> str | None:
        """None if every result of ``call`` keeps the budget, else what does not."""
        found = call()
        missing = self.oracle.keys() - found.keys()
        faults = [f"{name} is missing" for name in sorted(missing)]
        for name, value in found.items():
            error, literal = relative_error(value, self.oracle[name]), self.literal_errors[name]
            if not within_budget(error, literal, self.case.dtype):
                faults.append(f"{name}: error {error:.1e}, the plain computation's own is {literal:.1e}")
        return "; ".join(faults) or None


def _reference(case: Case, problem: Problem) -> dict[str, Tensor]:
    """The reference provider's result, some tokens at a time: tokens' rows joined, gradients of weights added up."""
    parts = [prepare(PROVIDERS["reference"], case, chunk)() for chunk in problem.chunks(CHUNK_TOKENS)]
    joined: dict[str, Tensor] = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        joined[name] = torch.cat(tensors) if name in ("y", "x") else torch.stack(tensors).sum(dim=0)
    return joined
