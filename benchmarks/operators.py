"""The operators as a layer calls them: operands of a round, calls by name, and the launches that they make.

What the benchmarks know of the operators' signatures and launches stands here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.checks import Built, Judge, Subject, Tensors, Verdict, sample_rows
from graphmoe_kernels import (
    ExpertOperands,
    GateUp,
    LowRankUpdate,
    expert_swiglu,
    gru_step,
    route_tokens,
)
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import Launch, recorded
from graphmoe_kernels.rethinking.weights import padded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
Draw = Callable[..., Tensor]
# Sets of operands that a turn walks through, so that together they exceed the L2 cache by half.
MAX_COPIES = 512
COLD_FACTOR = 1.5


class Operator(NamedTuple):
    """An operator in the first round or a later one."""

    name: str  # as cases and results call it
    later: bool  # whether it is a later round's call
    draw: Callable[[Draw, Sizes, bool], Tensors]  # (draw, sizes, later) -> random operands in which no term is small
    run: Callable[[Tensors, int, str], Tensors]  # (operands, top_k, backend) -> outputs, floating ones differentiable
    per_token: frozenset[str]  # operands whose first dimension is the tokens
    fixed: frozenset[str] = frozenset()  # floating operands that take no gradient

    @property
    def title(self) -> str:
        """Name and round."""
        return f"{self.name}, {'later' if self.later else 'first'} round"

    def operands(self, sizes: Sizes, device: torch.device) -> Tensors:
        """Random operands from a fixed seed."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = DTYPES[sizes.dtype]) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

        return self.draw(draw, sizes, self.later)

    def subject(self, operands: Tensors, top_k: int, backend: str, dtype: torch.dtype | None = None) -> Subject:
        """The operator on a backend, over those of ``operands`` that are no tokens', in ``dtype`` if one is given."""
        shared = self._split(operands)[1]
        if dtype is not None:
            shared = {name: t.to(dtype) if t.is_floating_point() else t for name, t in shared.items()}
        return Subject(lambda given: self.run(given, top_k, backend), shared, self.fixed)

    def built(self, operands: Tensors, top_k: int, backend: str) -> Built:
        """The operator on a backend; it has to equal its reference."""
        plain = self.subject(operands, top_k, "reference")
        exact = self.subject(operands, top_k, "reference", torch.float64)
        return Built(self.subject(operands, top_k, backend), None, "reference", plain, exact)

    def judge(self, operands: Tensors, dtype: torch.dtype) -> Judge:
        """Checks gradients too."""
        own = self._split(operands)[0]
        tokens, device = len(next(iter(own.values()))), next(iter(own.values())).device
        return Judge(own, sample_rows(tokens, device), True, dtype)

    def _split(self, operands: Tensors) -> tuple[Tensors, Tensors]:
        """The tokens' operands and the others."""
        own = {name: t for name, t in operands.items() if name in self.per_token}
        return own, {name: t for name, t in operands.items() if name not in self.per_token}


def check_operator(operator: Operator, sizes: Sizes, device: torch.device, backend: str = "triton") -> Verdict:
    """An operator's outputs and gradients on all tokens against fp64 on a sample of them, as a layer calls it."""
    operands = operator.operands(sizes, device)
    return operator.judge(operands, DTYPES[sizes.dtype]).check(operator.built(operands, sizes.top_k, backend))


def _chosen(draw: Draw, sizes: Sizes) -> Tensor:
    scores = draw(sizes.tokens, sizes.experts, dtype=torch.float32)
    return scores.topk(sizes.top_k, dim=1).indices.to(torch.int32)


def routing_operands(draw: Draw, sizes: Sizes, later: bool) -> Tensors:
    """x [N, D] and an fp32 router [n, D]; later the sum of states H [N, G'] and the first round's logits."""
    inner = padded(sizes.gru_width) if later else sizes.hidden
    router = draw(sizes.experts, inner, std=inner**-0.5, dtype=torch.float32)
    offset = {"offset": draw(sizes.tokens, sizes.experts, dtype=torch.float32)} if later else {}
    return {"x": draw(sizes.tokens, inner), "router": router, **offset}


def run_routing(operands: Tensors, top_k: int, backend: str) -> Tensors:
    """`route_tokens`."""
    found = route_tokens(**operands, top_k=top_k, backend=backend)  # type: ignore[arg-type]
    return {"routing_weights": found.routing_weights, "logits": found.logits, "expert_ids": found.expert_ids}


def expert_operands(draw: Draw, sizes: Sizes, later: bool) -> Tensors:
    """The operands of `expert_swiglu`, without dropout and scale vectors."""
    N, F, n, r, G = sizes.tokens, sizes.intermediate, sizes.experts, sizes.rank, padded(sizes.gru_width)
    found = {
        "gate": draw(N, F),
        "up": draw(N, F),
        "low": draw(N, 2 * n * r),
        "gate_B": draw(n, F, r, std=0.5 * r**-0.5),
        "up_B": draw(n, F, r, std=0.5 * r**-0.5),
        "down_A": draw(n, r, F, std=F**-0.5),
        "routing_weights": draw(N, sizes.top_k, dtype=torch.float32).softmax(dim=1),
        "expert_ids": _chosen(draw, sizes),
    }
    if later:
        fold = {"fold_gate": draw(F, G, std=G**-0.5), "fold_up": draw(F, G, std=G**-0.5)}
        found |= {"state": draw(N, G), "low_update": draw(N, 2 * n * r), **fold}
    return found


def run_experts(operands: Tensors, top_k: int, backend: str) -> Tensors:
    """`expert_swiglu`."""
    o = operands
    packed = ExpertOperands(
        GateUp(o["gate"], o["up"]),
        o["low"],
        GateUp(o["gate_B"], o["up_B"]),
        o["down_A"],
        o["routing_weights"],
        o["expert_ids"],
        low_update=o.get("low_update"),
        update=LowRankUpdate(o["state"], o["fold_gate"], o["fold_up"]) if "state" in o else None,
    )
    hidden, low_down = expert_swiglu(packed, scale=2.0, backend=backend)
    return {"hidden": hidden, "low_down": low_down}


def gru_operands(draw: Draw, sizes: Sizes, later: bool) -> Tensors:
    """The operands of `gru_step` at the padded width."""
    N, G = sizes.tokens, padded(sizes.gru_width)
    found = {"inputs": draw(N, 3 * G), "candidate_weight": draw(G, G, std=G**-0.5), "candidate_bias": draw(G)}
    return found | ({"recurrent": draw(N, 2 * G), "state": draw(N, G), "total": draw(N, G)} if later else {})


def run_gru(operands: Tensors, top_k: int, backend: str) -> Tensors:
    """`gru_step`, in the first round without a state."""
    given: dict[str, Any] = {"recurrent": None, "state": None, "total": None, **operands}
    return {"out": gru_step(**given, backend=backend)}


EXPERTS_PER_TOKEN = frozenset(("gate", "up", "low", "routing_weights", "expert_ids", "state", "low_update"))
OPERATORS = tuple(
    Operator(name, later, draw, run, frozenset(per_token), frozenset(fixed))
    for name, rounds, draw, run, per_token, fixed in (
        ("experts", (True, False), expert_operands, run_experts, EXPERTS_PER_TOKEN, ()),
        ("routing", (True, False), routing_operands, run_routing, ("x", "offset"), ("offset",)),
        ("gru", (True, False), gru_operands, run_gru, ("inputs", "recurrent", "state", "total"), ()),
    )
    for later in rounds
)
# The operators that groups of cases time.
OF_GROUP = {"routing": "routing", "expert_swiglu": "experts", "gru_step": "gru"}


def find_operator(name: str, later: bool) -> Operator:
    """One of `OPERATORS`."""
    return next(operator for operator in OPERATORS if (operator.name, operator.later) == (name, later))


def launches_of(operator: Operator, sizes: Sizes, operands: Tensors) -> list[Launch]:
    """The launches of an operator's forward and backward on Triton, as a layer makes them."""
    subject = operator.subject(operands, sizes.top_k, "triton")
    own = {name: t for name, t in operands.items() if name in operator.per_token}
    outputs = subject.results(own)
    upstream = {name: torch.randn_like(t) for name, t in outputs.items() if t.is_floating_point()}
    with recorded() as found:
        subject.results(own, upstream)
    return found


def copies_of(operands: Tensors, l2_bytes: int, most: int = MAX_COPIES) -> tuple[list[Tensors], bool]:
    """The operands and copies of them, two sets at least, and whether together they exceed the L2 cache by half."""
    size = sum(t.numel() * t.element_size() for t in operands.values())
    count = max(2, min(most, math.ceil(COLD_FACTOR * l2_bytes / max(size, 1))))
    copies = ({name: t.clone() for name, t in operands.items()} for _ in range(count - 1))
    return [operands, *copies], count * size >= COLD_FACTOR * l2_bytes
