"""Calls of every operator, right ones and ones with up to two arguments spoilt, and what a right result is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphmoe_kernels import (
    RethinkingSpec,
    gru_step,
    rethink_reference,
    route_tokens,
    topk_softmax_routing,
)
from graphmoe_kernels.testing import cast_layer
from tests.kernels import gru_operands
from tests.kernels.operator_arguments import (
    DTYPES,
    expert_arguments,
    gru_arguments,
    layer_of,
    logits_arguments,
    rethinking_arguments,
    routing_arguments,
    run_experts,
    run_rethink,
    run_shared,
    shared_arguments,
)

# What an accepted call may be off by, relative to the result's norm: some hundred roundings.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


class Call(NamedTuple):
    """An operator's call: ``arguments`` by name, ``parts`` of it that hold further ones (a layer's weights)."""

    operator: str
    arguments: dict[str, Any]


class Operator(NamedTuple):
    """The function, right arguments of it, and a check of what a call gave, which is made where all of it is finite."""

    run: Callable[..., Any]
    arguments: st.SearchStrategy[dict[str, Any]]
    check: Callable[[dict[str, Any], Any], None]


# --- right results ---------------------------------------------------------------------------------------------------


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == exact.shape
    error = torch.linalg.vector_norm(found.double() - exact.double()).item()
    assert error <= TOLERANCE[dtype] * (1 + torch.linalg.vector_norm(exact.double()).item()), error


def check_routing(given: dict[str, Any], found: Any) -> None:
    """Against the definition in fp64, for whatever experts were chosen: the largest, up to rounding."""
    logits = given["logits"].double() if "logits" in given else given["x"].double() @ given["router"].double().T
    if given.get("offset") is not None:
        logits = logits + given["offset"].double()
    p, k = logits.softmax(-1), given["top_k"]
    experts = found.expert_ids.long()
    assert experts.shape == (len(logits), k)
    assert all(len(set(row)) == k for row in experts.tolist())
    chosen = p.gather(1, experts)
    assert (chosen.sort(descending=True).values - p.topk(k).values).abs().le(1e-4).all()
    weights = chosen / chosen.sum(-1, keepdim=True) if given["normalize"] else chosen
    assert_near(found.routing_weights, weights, torch.float32)
    if given["statistics"] is None:
        assert found.tokens_per_expert is found.probability_sums is None
        return
    counted = torch.ones(len(logits)) if given["token_mask"] is None else given["token_mask"].bool()
    counted = counted.double()[:, None]
    zeros = torch.zeros_like(p)
    assert torch.equal(found.tokens_per_expert.double(), (zeros.scatter(1, experts, 1.0) * counted).sum(0))
    mass = zeros.scatter(1, experts, chosen) if given["statistics"] == "topk" else p
    assert_near(found.probability_sums, (mass * counted).sum(0), torch.float32)


def _wide(given: dict[str, Any]) -> dict[str, Any]:
    """What a call reads in the dtype of its pre-activations, in fp64."""
    dtype, own = given["pre_activations.gate"].dtype, ("routing_weights", "scales.gate", "scales.up")
    return {
        name: (value if name in own else value.to(dtype)).double()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in given.items()
    }


def check_experts(given: dict[str, Any], found: tuple[Tensor, Tensor]) -> None:
    """Against the slot by slot definition in fp64."""
    exact = run_experts(**{**_wide(given), "backend": "reference"})
    for mine, theirs in zip(found, exact, strict=True):
        assert_near(mine, theirs, given["pre_activations.gate"].dtype)


def check_shared(given: dict[str, Any], found: Tensor) -> None:
    exact = run_shared(**{**_wide(given), "backend": "reference"})
    assert_near(found, exact, given["pre_activations.gate"].dtype)


def check_gru(given: dict[str, Any], found: Tensor) -> None:
    names = ("inputs", "recurrent", "state", "total", "candidate_weight", "candidate_bias")
    wide = [None if given[name] is None else given[name].double() for name in names]
    exact = gru_operands.by_definition(*wide, getattr(torch, given["candidate_activation"]))
    assert_near(found, exact, given["inputs"].dtype)


def check_rethinking(given: dict[str, Any], found: Any) -> None:
    """Against Algorithm 1 in fp64; in a lower precision a token may go to another expert, which is no error."""
    x = given["x"]
    assert (found.y.shape, found.y.dtype) == (x.shape, x.dtype)
    assert all(logits.shape[0] == len(x) for rounds in found.router_logits for logits in rounds)
    if x.dtype == torch.float64:
        spec = RethinkingSpec(**{name: given[name] for name in RethinkingSpec._fields})
        exact = rethink_reference(x, cast_layer(layer_of(given), torch.float64), spec)
        assert_near(found.y, exact, torch.float64)


OPERATORS = {
    "topk_softmax_routing": Operator(topk_softmax_routing, logits_arguments(), check_routing),
    "route_tokens": Operator(route_tokens, routing_arguments(), check_routing),
    "expert_swiglu": Operator(run_experts, expert_arguments(), check_experts),
    "swiglu": Operator(run_shared, shared_arguments(), check_shared),
    "gru_step": Operator(gru_step, gru_arguments(), check_gru),
    "rethink": Operator(run_rethink, rethinking_arguments(), check_rethinking),
}

# --- spoilt arguments ------------------------------------------------------------------------------------------------

WILD: list[Any] = [
    *(None, True, 0, 1, -1, 3, 2**40, 10**400, 0.0, 0.5, 1.0, -0.5, float("nan"), float("inf"), 2.0, 1j),
    *("", "auto", "torch", "none", b"torch", [], [1.0, 2.0], (), {}, {"a": 1}, object, torch.float32),
]
TENSOR_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    **{str(d): (lambda t, d=d: t.to(d)) for d in (*DTYPES[1:], torch.int64, torch.bool, torch.complex64, torch.uint8)},
    "int32": lambda t: t.to(torch.int32),
    "float8": lambda t: t.to(torch.float32).to(torch.float8_e4m3fn),
    "a row less": lambda t: t[:-1],
    "a column less": lambda t: t[..., :-1],
    "a row more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t,
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "one row": lambda t: t[:1],
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t[0] if t.dim() and len(t) else t.sum(),
    "a scalar": lambda t: t.sum(),
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "permuted in memory": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "a list": lambda t: t.tolist(),
    "NumPy's": lambda t: t.float().numpy(),
    "NaN": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t - 1,
    "infinite": lambda t: (
        torch.full_like(t, float("inf")) if t.is_floating_point() else t + 2**40 if t.dtype == torch.int64 else t
    ),
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
}


@st.composite
def calls(draw: Any, operator: str) -> Call:
    """A call of an operator with none, one or two of its arguments spoilt."""
    given = dict(draw(OPERATORS[operator].arguments))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        name = draw(st.sampled_from(sorted(given)))
        value = given[name]
        if isinstance(value, Tensor) and draw(st.integers(0, 4)):
            change = TENSOR_CHANGES[draw(st.sampled_from(sorted(TENSOR_CHANGES)))]
            try:
                given[name] = change(value)
            except (RuntimeError, TypeError, IndexError, NotImplementedError):
                continue  # this tensor has no such form: two changes can exclude each other
        else:
            given[name] = draw(st.sampled_from(WILD))
    return Call(operator, given)


def tensors(value: Any) -> list[Tensor]:
    """All the tensors in a result."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, tuple | list) else []


def is_plain(call: Call) -> bool:
    """Whether all tensors of a call hold finite numbers on the CPU, so that there is one right result."""
    found = [value for value in call.arguments.values() if isinstance(value, Tensor)]
    return all(t.device.type == "cpu" and (not t.is_floating_point() or bool(t.isfinite().all())) for t in found)
