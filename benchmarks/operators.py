"""The operators as a layer calls them: operands of a round, results and gradients by name, launches on their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels import (
    ExpertOperands,
    GateUp,
    LowRankUpdate,
    expert_order,
    expert_swiglu,
    gru_step,
    route_tokens,
)
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import SKINNY_TOKENS
from graphmoe_kernels.rethinking.folding import padded

Operands = dict[str, Tensor]
Outputs = dict[str, Tensor]


class Operator(NamedTuple):
    """An operator in the first round or a later one.

    Attributes:
        name: how results call it.
        later: whether it is a later round's call.
        operands: (sizes, later, dtype, device) -> random operands in which no term is small.
        run: (operands, backend) -> outputs by name, the floating ones differentiable.
        per_token: operands whose first dimension is the tokens.
        fixed: floating operands that take no gradient.
    """

    name: str
    later: bool
    operands: Callable[[Sizes, bool, torch.dtype, torch.device], Operands]
    run: Callable[[Operands, str], Outputs]
    per_token: frozenset[str]
    fixed: frozenset[str] = frozenset()

    @property
    def title(self) -> str:
        """Name and round."""
        return f"{self.name}, {'later' if self.later else 'first'} round"


def _drawer(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    return draw


def _chosen(sizes: Sizes, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    scores = torch.rand(sizes.tokens, sizes.experts, generator=generator, device=device)
    return scores.topk(sizes.top_k, dim=1).indices.to(torch.int32)


def route_operands(sizes: Sizes, later: bool, dtype: torch.dtype, device: torch.device) -> Operands:
    """x [N, D] and an fp32 router [n, D]; later the sum of states H [N, G'] and the first round's logits."""
    draw, inner = _drawer(dtype, device), padded(sizes.gru_width) if later else sizes.hidden
    found = {
        "x": draw(sizes.tokens, inner),
        "router": draw(sizes.experts, inner, std=inner**-0.5, dtype=torch.float32),
    }
    return found | ({"offset": draw(sizes.tokens, sizes.experts, dtype=torch.float32)} if later else {})


def run_route(operands: Operands, backend: str) -> Outputs:
    """`route_tokens` for two experts a token (one where there is one)."""
    experts = operands["router"].shape[0]
    found = route_tokens(**operands, top_k=min(2, experts), backend=backend)  # type: ignore[arg-type]
    return {"weights": found.routing_weights, "logits": found.logits, "experts": found.expert_ids}


def order_operands(sizes: Sizes, later: bool, dtype: torch.dtype, device: torch.device) -> Operands:
    """The chosen experts [N, k]."""
    return {"experts": _chosen(sizes, device)}


def run_order(operands: Operands, backend: str) -> Outputs:
    """The two smallest experts of every token, in order: what an order has to sort; elsewhere by PyTorch's sort."""
    pairs = operands["experts"].sort(dim=1).values[:, :2].long()
    keys = pairs[:, 0] * 256 + pairs[:, -1]
    if backend != "triton":
        return {"order": keys.argsort(stable=True).int()}
    return {"order": expert_order(operands["experts"])}


def expert_operands(sizes: Sizes, later: bool, dtype: torch.dtype, device: torch.device) -> Operands:
    """The operands of `expert_swiglu`, without dropout and scale vectors."""
    N, F, n, r = sizes.tokens, sizes.intermediate, sizes.experts, sizes.rank
    G, draw = padded(sizes.gru_width), _drawer(dtype, device)
    found = {
        "gate": draw(N, F),
        "up": draw(N, F),
        "low": draw(N, 2 * n * r),
        "gate_B": draw(n, F, r, std=0.5 * r**-0.5),
        "up_B": draw(n, F, r, std=0.5 * r**-0.5),
        "down_A": draw(n, r, F, std=F**-0.5),
        "weights": draw(N, sizes.top_k, dtype=torch.float32).softmax(dim=1),
        "experts": _chosen(sizes, device),
    }
    if later:
        found |= {
            "state": draw(N, G),
            "fold_gate": draw(F, G, std=G**-0.5),
            "fold_up": draw(F, G, std=G**-0.5),
            "low_update": draw(N, 2 * n * r),
        }
    return found


def run_experts(operands: Operands, backend: str) -> Outputs:
    """`expert_swiglu`; with an ``order`` among the operands Triton works in it."""
    o = operands
    packed = ExpertOperands(
        GateUp(o["gate"], o["up"]),
        o["low"],
        GateUp(o["gate_B"], o["up_B"]),
        o["down_A"],
        o["weights"],
        o["experts"],
        low_update=o.get("low_update"),
        update=LowRankUpdate(o["state"], o["fold_gate"], o["fold_up"]) if "state" in o else None,
        token_order=o.get("order"),
    )
    hidden, low_down = expert_swiglu(packed, scale=2.0, backend=backend)
    return {"hidden": hidden, "low_down": low_down}


def gru_operands(sizes: Sizes, later: bool, dtype: torch.dtype, device: torch.device) -> Operands:
    """The operands of `gru_step` at the padded width."""
    N, G, draw = sizes.tokens, padded(sizes.gru_width), _drawer(dtype, device)
    found = {
        "inputs": draw(N, 3 * G),
        "candidate_weight": draw(G, G, std=G**-0.5),
        "candidate_bias": draw(G),
    }
    if later:
        found |= {"recurrent": draw(N, 2 * G), "state": draw(N, G), "total": draw(N, G)}
    return found


def run_gru(operands: Operands, backend: str) -> Outputs:
    """`gru_step`, in the first round without a state."""
    given: dict[str, Any] = {"recurrent": None, "state": None, "total": None, **operands}
    return {"out": gru_step(**given, backend=backend)}


def _rounds(
    name: str,
    operands: Callable[[Sizes, bool, torch.dtype, torch.device], Operands],
    run: Callable[[Operands, str], Outputs],
    per_token: set[str],
    fixed: frozenset[str] = frozenset(),
) -> tuple[Operator, Operator]:
    """An operator in a later round, which costs more, and in the first."""
    later = Operator(name, True, operands, run, frozenset(per_token), fixed)
    return later, later._replace(later=False)


OPERATORS = (
    *_rounds(
        "experts",
        expert_operands,
        run_experts,
        {"gate", "up", "low", "weights", "experts", "state", "low_update", "order"},
    ),
    *_rounds("routing", route_operands, run_route, {"x", "offset"}, frozenset({"offset"})),
    *_rounds("gru", gru_operands, run_gru, {"inputs", "recurrent", "state", "total"}),
    Operator("order", False, order_operands, run_order, frozenset({"experts"})),
)


def gradients(operator: Operator, operands: Operands, backend: str, upstream: Outputs) -> Outputs:
    """Outputs and, for each floating operand that takes one, ``d_<name>``, under the upstream gradients."""
    leaves = {
        name: t.detach().requires_grad_() if t.is_floating_point() and name not in operator.fixed else t
        for name, t in operands.items()
    }
    outputs = operator.run(leaves, backend)
    asked = {name: t for name, t in leaves.items() if t.requires_grad}
    driven = [name for name in upstream if outputs[name].requires_grad]
    found = {name: t.detach() for name, t in outputs.items()}
    if driven:
        grads = torch.autograd.grad(
            [outputs[name] for name in driven],
            list(asked.values()),
            [upstream[name].to(outputs[name].dtype) for name in driven],
            allow_unused=True,
        )
        pairs = zip(asked.items(), grads, strict=True)
        found |= {f"d_{name}": torch.zeros_like(t) if grad is None else grad for (name, t), grad in pairs}
    return found


def forward_only(operator: Operator, operands: Operands, backend: str) -> Outputs:
    """Outputs without an autograd graph."""
    with torch.no_grad():
        return operator.run(operands, backend)


def with_order(operator: Operator, operands: Operands) -> Operands:
    """With the order of tokens that a layer makes for the experts' Triton kernels, where it makes one."""
    if operator.name != "experts" or operands["gate"].shape[0] <= SKINNY_TOKENS:
        return operands
    return operands | {"order": expert_order(operands["experts"])}
