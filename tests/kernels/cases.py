"""What the tests of the operators share: small layers, gradients by name, errors against an oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from graphmoe_kernels import LayerWeights, RethinkingSpec, rethink_literal
from graphmoe_kernels.rethinking import call
from graphmoe_kernels.testing import cast_layer, make_layer, trainable

# Below this share of the upstream gradient's norm a gradient is judged by its absolute error: some are zero
# in real arithmetic (the router's, when one renormalised weight is always 1) and mere rounding when computed.
ZERO = 1e-3


class Sizes(NamedTuple):
    """Odd everywhere on purpose: no width is a multiple of a tile, the GRU's is padded."""

    hidden: int = 13
    intermediate: int = 21
    experts: int = 5
    rank: int = 3
    width: int = 6


ODD = Sizes()


def layer(spec: RethinkingSpec, sizes: Sizes = ODD, **options) -> LayerWeights:
    """A random fp64 layer for these settings, with further ones of `make_layer`; a GRU if there is a second round."""
    *shape, width = sizes
    return make_layer(*shape, width if spec.rounds > 1 else None, **options)


def rounded(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    """The fp64 layer whose weights are exactly those that ``dtype`` holds."""
    return cast_layer(cast_layer(weights, dtype), torch.float64)


def gradients(
    run: Callable[[Tensor, LayerWeights], Tensor],
    x: Tensor,
    weights: LayerWeights,
    upstream: Tensor,
    *,
    x_trainable: bool = True,
) -> dict[str, Tensor]:
    """y and the gradient of every trainable tensor (and of x) under an upstream gradient, by name."""
    weights = cast_layer(weights, weights.experts.lora.gate_A.dtype, requires_grad=True)
    x = x.detach().clone().requires_grad_(x_trainable)
    y = run(x, weights)
    y.backward(upstream.to(y.dtype))
    leaves = trainable(weights) | ({"x": x} if x_trainable else {})
    found = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {"y": y.detach(), **found}


def errors(found: dict[str, Tensor], oracle: dict[str, Tensor], upstream: Tensor) -> dict[str, float]:
    """Relative error by name, against `ZERO` times the upstream's norm where the oracle is smaller."""
    assert found.keys() == oracle.keys()
    floor = ZERO * torch.linalg.vector_norm(upstream.double()).item()
    result = {}
    for name, exact in oracle.items():
        difference = torch.linalg.vector_norm(found[name].double() - exact.double()).item()
        result[name] = difference / (max(torch.linalg.vector_norm(exact.double()).item(), floor) or 1.0)
    return result


def assert_equal_to(found: dict[str, Tensor], oracle: dict[str, Tensor], upstream: Tensor, bound: float = 1e-12):
    """Every entry within ``bound`` of the oracle; the message lists those that are not."""
    off = {name: error for name, error in errors(found, oracle, upstream).items() if not error <= bound}
    assert not off, f"relative errors above {bound}: {off}"


@contextmanager
def recorded_logits() -> Iterator[list[Tensor]]:
    """The router logits of every round of every recurrence run inside, in order."""
    seen: list[Tensor] = []
    original = call.run_routing

    def route(*args, **kwargs):
        routing = original(*args, **kwargs)
        seen.append(routing.logits.detach().clone())
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, "run_routing", route)
        yield seen


def chosen_experts(logits: list[Tensor], top_k: int) -> Tensor:
    """The set of experts of every token and round as 0/1, [T, N, n]."""
    stacked = torch.stack([x.double() for x in logits])
    return torch.zeros_like(stacked).scatter(-1, stacked.topk(top_k, dim=-1).indices, 1)


def decided_tokens(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, margin: float) -> Tensor:
    """The tokens of fp64 x whose k-th and (k+1)-th logits are ``margin`` apart in every round: [N] bool."""
    with torch.no_grad(), recorded_logits() as seen:
        rethink_literal(x, weights, spec)
    ordered = torch.stack(seen).sort(dim=-1, descending=True).values  # [T, N, n]
    if spec.top_k == ordered.shape[-1]:
        return torch.ones(x.shape[0], dtype=torch.bool)
    return (ordered[..., spec.top_k - 1] - ordered[..., spec.top_k] > margin).all(dim=0)
