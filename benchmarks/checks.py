"""Who may be timed: an operator whose results and gradients keep the error budget against fp64, on a sample of tokens.

The operator runs on all its tokens; the upstream gradients are zero but for the sample's, so that the gradients of
weights are sums over the sample. So the oracle in fp64, and the plain computation whose error is the budget, need run
on the sample alone, at any size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.operators import Operands, Operator, Outputs, gradients, run_order
from graphmoe_kernels.testing import within_budget

# Tokens that are checked: the oracle of that many is most of a check, and a CPU takes long for it.
SAMPLE = {"cpu": 16, "cuda": 32}


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


def device_error(value: Tensor, oracle: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over that of the oracle (or ``floor``, if larger), in fp64 where the tensors are."""
    oracle = oracle.double()
    norm = max(torch.linalg.vector_norm(oracle).item(), floor)
    return torch.linalg.vector_norm(value.double() - oracle).item() / (norm or 1.0)


def sample_rows(tokens: int, device: torch.device) -> Tensor:
    """The rows that are checked, spread over all, first and last included."""
    size = min(tokens, SAMPLE[device.type])
    return torch.linspace(0, max(tokens - 1, 0), size, dtype=torch.float64).round().long().to(device)


def sampled(operator: Operator, operands: Operands, rows: Tensor, dtype: torch.dtype | None) -> Operands:
    """The operands of the sampled tokens, the floating ones in ``dtype``, without an order."""
    found = {}
    for name, t in operands.items():
        if name == "order":
            continue
        part = t[rows] if name in operator.per_token else t
        found[name] = part.to(dtype) if dtype is not None and part.is_floating_point() else part
    return found


def verdict(found: Outputs, plain: Outputs, oracle: Outputs, dtype: torch.dtype, floor: float = 0.0) -> Verdict:
    """Every tensor of the oracle against the budget; integer tensors have to be equal."""
    errors: dict[str, tuple[float, float]] = {}
    faults = [f"{name} is missing" for name in sorted(oracle.keys() - found.keys())]
    for name, exact in oracle.items():
        if name not in found:
            continue
        if exact.numel() == 0:
            faults.append(f"{name} has no elements to compare")
            continue
        if not exact.is_floating_point():
            if not torch.equal(found[name].long(), exact.long()):
                faults.append(f"{name} differs")
            continue
        pair = device_error(found[name], exact, floor), device_error(plain[name], exact, floor)
        errors[name] = pair
        if not within_budget(*pair, dtype):
            faults.append(f"{name}: error {pair[0]:.1e}, the plain computation's own is {pair[1]:.1e}")
    return Verdict(errors, "; ".join(faults) or None)


def check_operator(operator: Operator, operands: Operands, dtype: torch.dtype, backend: str = "triton") -> Verdict:
    """An operator's outputs and gradients on all tokens against fp64 on a sample of them."""
    if operator.name == "order":
        return _check_order(operator, operands, backend)
    tokens = next(t.shape[0] for name, t in operands.items() if name in operator.per_token)
    device = next(iter(operands.values())).device
    rows = sample_rows(tokens, device)
    few = sampled(operator, operands, rows, None)
    shapes = {name: t for name, t in operator.run(few, "reference").items() if t.is_floating_point()}
    generator = torch.Generator(device).manual_seed(2)
    upstream = {
        name: torch.randn(t.shape, generator=generator, device=device).to(t.dtype) for name, t in shapes.items()
    }
    wide = {name: t.new_zeros(tokens, *t.shape[1:]).index_copy_(0, rows, t) for name, t in upstream.items()}
    found = gradients(operator, operands, backend, wide)
    at_rows = {f"d_{name}" for name in operator.per_token} | shapes.keys() | {"experts"}
    found = {name: t[rows] if name in at_rows else t for name, t in found.items()}
    plain = gradients(operator, few, "reference", upstream)
    exact = gradients(
        operator,
        sampled(operator, operands, rows, torch.float64),
        "reference",
        {n: u.double() for n, u in upstream.items()},
    )
    norm = sum(torch.linalg.vector_norm(u.double()).item() ** 2 for u in upstream.values()) ** 0.5
    # A gradient that is zero in real arithmetic is judged by its absolute error.
    return verdict(found, plain, exact, dtype, floor=1e-3 * norm)


def _check_order(operator: Operator, operands: Operands, backend: str) -> Verdict:
    order = operator.run(operands, backend)["order"]
    if not torch.equal(order.long(), run_order(operands, "torch")["order"].long()):
        return Verdict({}, "the order is not the stable sort by the two smallest experts")
    return Verdict({}, None)
