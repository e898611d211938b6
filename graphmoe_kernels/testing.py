"""Inputs, errors and budgets for tests and benchmarks of the operators.

The budget: in any dtype below fp64, an implementation's error against the fp64 oracle is at most twice the error that
the literal computation makes in that same dtype, plus a small absolute term. No tolerance is a matter of taste.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from graphmoe_kernels.rethinking.chosen import ChosenExperts, SingleExpert
from graphmoe_kernels.rethinking.kinds import ExpertKind, LayerWeights
from graphmoe_kernels.rethinking.mixed import MixedExperts
from graphmoe_kernels.rethinking.weights import DenseMLP, ExpertWeights, GRUWeights, LinearRouters, Magnitudes
from graphmoe_kernels.structures import map_tensors

# Absolute slack, relative to the oracle's norm: what is left when the literal computation happens to be exact.
SLACK = {torch.float64: 1e-12, torch.float32: 2e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}


def make_layer(
    hidden: int,
    intermediate: int,
    num_experts: int,
    rank: int,
    gru_width: int | None,
    *,
    bias: bool = False,
    routers: Literal["layer", "linear"] | None = "layer",
    dora: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> LayerWeights:
    """A layer of random weights in which every term matters: nothing is zero, all parts have like sizes.

    Shapes as in `LayerWeights`; ``gru_width=None`` gives a layer without GRU, ``routers`` one that chooses experts, one
    for each linear, or none (for one expert), ``dora`` magnitudes off their start. Drawn in fp64, then rounded.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device, dtype)

    D, F, n, r = hidden, intermediate, num_experts, rank
    biases = (draw(F, std=0.3), draw(F, std=0.3), draw(D, std=0.3)) if bias else (None, None, None)
    base = DenseMLP(draw(F, D, std=D**-0.5), draw(F, D, std=D**-0.5), draw(D, F, std=F**-0.5), *biases)
    lora = ExpertWeights(
        gate_A=draw(n, r, D, std=D**-0.5),
        gate_B=draw(n, F, r, std=0.5 * r**-0.5),
        up_A=draw(n, r, D, std=D**-0.5),
        up_B=draw(n, F, r, std=0.5 * r**-0.5),
        down_A=draw(n, r, F, std=F**-0.5),
        down_B=draw(n, D, r, std=0.5 * r**-0.5),
    )
    gru = None
    if gru_width is not None:
        G = gru_width
        update, reset, candidate = (draw(G, G + D, std=(G + D) ** -0.5) for _ in range(3))
        gru = GRUWeights(update, reset, candidate, draw(G, std=0.3), draw(D, G, std=G**-0.5))
    router = draw(n, D, std=2 * D**-0.5)
    linear_routers = None
    if routers == "linear":
        linear_routers = LinearRouters(*(draw(n, width, std=2 * width**-0.5) for width in (D, D, F)))
    if dora:
        norms = (torch.linalg.vector_norm(weight, dim=1) for weight in (base.gate, base.up, base.down))
        gate, up, down = (norm * (1 + 0.5 * draw(n, len(norm), std=1).tanh()) for norm in norms)
        lora = lora._replace(magnitudes=Magnitudes(gate, up, down))
    experts: ExpertKind = SingleExpert(lora) if routers is None else ChosenExperts(lora, router)
    if linear_routers is not None:
        experts = MixedExperts(lora, linear_routers)
    return LayerWeights(base, experts, gru)


def cast_layer(
    weights: LayerWeights, dtype: torch.dtype, device: str | None = None, requires_grad: bool = False
) -> LayerWeights:
    """The layer's tensors copied to ``dtype``, on ``device`` or where they are; new leaves if ``requires_grad``."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, dtype, copy=True).requires_grad_(requires_grad)

    frozen = map_tensors(lambda tensor: tensor.detach().to(device, dtype), weights.base.dense())
    return LayerWeights(frozen, map_tensors(copied, weights.experts), map_tensors(copied, weights.gru))


def trainable(weights: LayerWeights) -> dict[str, Tensor]:
    """The layer's trainable tensors by name."""
    experts = weights.experts
    named: dict[str, Tensor] = {}
    if isinstance(experts, ChosenExperts):
        named["router"] = experts.router
    named |= dict(zip(ExpertWeights._fields, experts.lora.pairs, strict=False))
    if experts.lora.magnitudes is not None:
        named |= {f"{name}_magnitude": tensor for name, tensor in experts.lora.magnitudes._asdict().items()}
    if isinstance(experts, MixedExperts):
        named |= {f"router.{name}": tensor for name, tensor in experts.linear_routers._asdict().items()}
    if weights.gru is not None:
        named |= {f"gru.{name}": tensor for name, tensor in weights.gru._asdict().items()}
    return named


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """Frobenius norm of the difference over that of the oracle, in fp64 (absolute where the oracle is zero)."""
    value, oracle = value.detach().double().cpu(), oracle.detach().double().cpu()
    norm = torch.linalg.vector_norm(oracle).item()
    return torch.linalg.vector_norm(value - oracle).item() / (norm if norm > 0 else 1.0)


def within_budget(error: float, literal_error: float, dtype: torch.dtype) -> bool:
    """Whether ``error`` keeps the budget that the literal computation's own error in ``dtype`` sets."""
    return error <= 2 * literal_error + SLACK[dtype]
