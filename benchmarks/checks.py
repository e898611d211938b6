"""Who may be timed: what keeps the error budget against the fp64 oracle, on a sample of tokens, gradients included.

A contender runs on all its tokens; in a backward the gradients of its outputs are zero but for the sample's, so that
the gradients of weights are sums over the sample. So the oracle in fp64, and the plain computation whose error is the
budget, need run on the sample alone, at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphmoe_kernels.testing import within_budget

Tensors = dict[str, Tensor]

# Tokens that are checked: the oracle of that many is most of a check, and a CPU takes long for it.
SAMPLE = {"cpu": 16, "cuda": 32}


class Subject(NamedTuple):
    """Something that computes outputs from operands, all by name."""

    run: Callable[[Tensors], Tensors]  # operands -> outputs, the floating ones differentiable
    shared: Tensors  # the operands that are no tokens', such as weights
    fixed: frozenset[str] = frozenset()  # floating operands that take no gradient

    def results(self, operands: Tensors, upstream: Tensors | None = None) -> Tensors:
        """Outputs and, under ``upstream`` gradients of them, ``d_<name>`` of every floating operand."""
        given = {**self.shared, **operands}
        if upstream is None:
            with torch.no_grad():
                return self.run(given)
        leaves = {
            name: t if t.requires_grad else t.detach().requires_grad_()
            for name, t in given.items()
            if t.is_floating_point() and name not in self.fixed
        }
        outputs = self.run({**given, **leaves})
        driven = [name for name in upstream if outputs[name].requires_grad]
        if not driven:
            return outputs
        grads = torch.autograd.grad(
            [outputs[name] for name in driven],
            list(leaves.values()),
            [upstream[name].to(outputs[name].dtype) for name in driven],
            allow_unused=True,
        )
        pairs = zip(leaves.items(), grads, strict=True)
        found = {f"d_{name}": torch.zeros_like(t) if grad is None else grad for (name, t), grad in pairs}
        return {name: t.detach() for name, t in outputs.items()} | found


class Built(NamedTuple):
    """A contender, and what it has to equal."""

    subject: Subject  # what is timed
    module: nn.Module | None  # what has a training and an evaluation mode, if anything
    definition: str  # its name; contenders of one name have to equal the same
    plain: Subject  # the definition in the contender's dtype
    exact: Subject  # and in fp64

    def set_mode(self, training: bool) -> None:
        """Training or evaluation mode, where there is one."""
        if self.module is not None:
            self.module.train(training)


class Verdict(NamedTuple):
    """Errors by tensor, each with the plain computation's own, and what is wrong (None if nothing is)."""

    errors: dict[str, tuple[float, float]]
    fault: str | None

    def record(self) -> dict[str, Any]:
        """As the result file has it."""
        worst = max(self.errors.values(), key=lambda pair: pair[0] / (pair[1] + 1e-30), default=(0.0, 0.0))
        return {
            "passed": self.fault is None,
            "fault": self.fault,
            "largest error": worst[0],
            "plain computation's own": worst[1],
            "tensors": len(self.errors),
        }


def in_a_line(error: Exception) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}"


def device_error(value: Tensor, oracle: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over that of the oracle (or ``floor``, if larger), in fp64 where the tensors are."""
    oracle = oracle.double()
    norm = max(torch.linalg.vector_norm(oracle).item(), floor)
    return torch.linalg.vector_norm(value.double() - oracle).item() / (norm or 1.0)


def sample_rows(tokens: int, device: torch.device) -> Tensor:
    """The rows that are checked, spread over all, first and last included."""
    size = min(tokens, SAMPLE[device.type])
    return torch.linspace(0, max(tokens - 1, 0), size, dtype=torch.float64).round().long().to(device)


def verdict(found: Tensors, plain: Tensors, oracle: Tensors, dtype: torch.dtype, floor: float = 0.0) -> Verdict:
    """Every tensor of the oracle against the budget; integer tensors have to be equal."""
    errors: dict[str, tuple[float, float]] = {}
    faults = [f"{name} is missing" for name in sorted(oracle.keys() - found.keys())]
    for name, exact in oracle.items():
        if name not in found:
            continue
        if exact.numel() == 0:
            faults.append(f"{name} has no elements to compare")
        elif not exact.is_floating_point():
            if not torch.equal(found[name].long(), exact.long()):
                faults.append(f"{name} differs")
        else:
            pair = device_error(found[name], exact, floor), device_error(plain[name], exact, floor)
            errors[name] = pair
            if not within_budget(*pair, dtype):
                faults.append(f"{name}: error {pair[0]:.1e}, the plain computation's own is {pair[1]:.1e}")
    return Verdict(errors, "; ".join(faults) or None)


class Judge:
    """Checks contenders on a sample of tokens; what several of them have to equal is computed once.

    Args:
        operands: of all tokens, the floating ones in the contenders' dtype or fp32.
        rows: the tokens that are checked.
        training: whether gradients are checked too.
        dtype: whose budget counts.
    """

    def __init__(self, operands: Tensors, rows: Tensor, training: bool, dtype: torch.dtype) -> None:
        self.operands, self.rows, self.training, self.dtype = operands, rows, training, dtype
        self.tokens = next(iter(operands.values())).shape[0]
        self.upstream: Tensors = {}
        self._known: dict[str, tuple[Tensors, Tensors]] = {}

    def check(self, built: Built) -> Verdict:
        """Outputs at the sampled rows and, in training, every gradient of a loss over them, against fp64."""
        self.definitions(built)
        built.set_mode(self.training)
        wide = {
            n: t.new_zeros(self.tokens, *t.shape[1:]).index_copy_(0, self.rows, t) for n, t in self.upstream.items()
        }
        return self.compare(built, built.subject.results(self.operands, wide if self.training else None))

    def compare(self, built: Built, found: Tensors, gradients: bool = True) -> Verdict:
        """Results on all tokens, however they were computed; ``gradients`` False for outputs alone."""
        plain, exact = self.definitions(built)
        if not gradients:
            exact = {name: t for name, t in exact.items() if not name.startswith("d_")}
        of_tokens = {name for name in exact if not name.startswith("d_")} | {f"d_{name}" for name in self.operands}
        at_rows = {name: t[self.rows] if name in of_tokens else t for name, t in found.items()}
        return verdict(at_rows, plain, exact, self.dtype, self.floor())

    def floor(self) -> float:
        """Below this norm a gradient is judged by its absolute error: some are zero in real arithmetic."""
        norms = [torch.linalg.vector_norm(u.double()).item() for u in self.upstream.values()]
        return 1e-3 * math.hypot(*norms) if self.training else 0.0

    def definitions(self, built: Built) -> tuple[Tensors, Tensors]:
        """What ``built`` has to equal at the sampled rows: in its dtype, and in fp64."""
        if built.definition not in self._known:
            few = {name: t[self.rows] for name, t in self.operands.items()}
            wide = {name: t.double() if t.is_floating_point() else t for name, t in few.items()}
            exact = None
            if self.training:
                self._draw_upstream(built.plain.results(few))
                exact = {name: t.double() for name, t in self.upstream.items()}
            plain = built.plain.results(few, self.upstream if self.training else None)
            self._known[built.definition] = plain, built.exact.results(wide, exact)
        return self._known[built.definition]

    def _draw_upstream(self, outputs: Tensors) -> None:
        generator = torch.Generator(self.rows.device).manual_seed(7)
        for name, t in outputs.items():
            if t.is_floating_point() and name not in self.upstream:
                drawn = torch.randn(t.shape, generator=generator, device=t.device)
                self.upstream[name] = drawn.to(t.dtype)
