"""Calls of every operator, right ones and ones with up to two arguments spoilt, and what a right result is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphmoe_kernels import (
    ACTIVATIONS,
    ChosenExperts,
    DenseMLP,
    Dropout,
    ExpertOperands,
    ExpertWeights,
    GateUp,
    GRUWeights,
    LayerWeights,
    LinearRouters,
    LowRankUpdate,
    Magnitudes,
    MixedExperts,
    RethinkingSpec,
    SingleExpert,
    expert_order,
    expert_swiglu,
    gru_step,
    rethink,
    rethink_reference,
    route_tokens,
    swiglu,
    topk_softmax_routing,
)
from graphmoe_kernels.testing import cast_layer, make_layer
from tests.kernels import expert_operands, gru_operands

DTYPES = [torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]
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


# --- right arguments -------------------------------------------------------------------------------------------------

backends = st.sampled_from(["auto", "torch", "reference"])
seeds = st.integers(0, 2**16)


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def masks(tokens: int) -> st.SearchStrategy[Tensor | None]:
    mask = st.lists(st.integers(0, 7), min_size=tokens, max_size=tokens)
    return st.one_of(
        st.none(), mask.map(lambda m: torch.tensor(m, dtype=torch.int64)), mask.map(lambda m: torch.tensor(m) > 2)
    )


@st.composite
def routing_arguments(draw: Any) -> dict[str, Any]:
    tokens, width, experts = draw(st.integers(0, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(seeds)
    return {
        "x": randn(tokens, width, dtype=dtype, seed=seed),
        "router": randn(experts, width, dtype=draw(st.sampled_from(DTYPES)), seed=seed + 1),
        "top_k": draw(st.integers(1, experts)),
        "offset": draw(st.sampled_from([None, randn(tokens, experts, dtype=torch.float32, seed=seed + 2)])),
        "normalize": draw(st.booleans()),
        "statistics": draw(st.sampled_from([None, "topk", "full"])),
        "token_mask": draw(masks(tokens)),
        "backend": draw(backends),
    }


@st.composite
def logits_arguments(draw: Any) -> dict[str, Any]:
    given = draw(routing_arguments())
    tokens, experts = given["x"].shape[0], given.pop("router").shape[0]
    del given["offset"]
    return {"logits": randn(tokens, experts, dtype=given.pop("x").dtype, seed=draw(seeds)), **given}


# Operands by the names that refusals call them by.
FIELDS = {
    **{"gate": "pre_activations.gate", "up": "pre_activations.up", "gate_B": "B.gate", "up_B": "B.up"},
    **{"state": "update.state", "fold_gate": "update.gate", "fold_up": "update.up"},
    **{"gate_scale": "scales.gate", "up_scale": "scales.up", "gate_bias": "biases.gate", "up_bias": "biases.up"},
    **{"dropout": "dropout.rate", "seed": "dropout.seed"},
}


@st.composite
def expert_arguments(draw: Any) -> dict[str, Any]:
    experts = draw(st.integers(1, 5))
    torch.manual_seed(draw(seeds))
    given: dict[str, Any] = expert_operands.operands(
        tokens=draw(st.integers(0, 6)),
        width=draw(st.integers(1, 11)),
        experts=experts,
        rank=draw(st.integers(0, 4)),
        top_k=draw(st.integers(1, experts)),
        inner=draw(st.sampled_from([None, 3])),
        scales=draw(st.booleans()),
        biases=draw(st.booleans()),
    )
    given = expert_operands.cast(given, draw(st.sampled_from(DTYPES)))
    if draw(st.sampled_from([False, False, True])):
        given |= {"dropout": draw(st.sampled_from([0.0, 0.5])), "seed": torch.tensor([7])}
    given = {FIELDS.get(name, name): value for name, value in given.items()}
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    return {**given, "scale": 1.5, "activation": activation, "backend": draw(backends)}


@st.composite
def shared_arguments(draw: Any) -> dict[str, Any]:
    given = draw(expert_arguments())
    names = [name for name in given if name.startswith(("pre_activations.", "update."))]
    return {name: given[name] for name in (*names, "activation", "backend")}


def grouped(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of one group (``update.state``) as its type."""
    kinds = {"update": LowRankUpdate, "dropout": Dropout}
    found = {name: value for name, value in given.items() if "." not in name}
    for group in dict.fromkeys(name.partition(".")[0] for name in given if "." in name):
        own = {name.partition(".")[2]: value for name, value in given.items() if name.startswith(f"{group}.")}
        found[group] = kinds.get(group, GateUp)(**own)
    return found


def run_experts(scale: Any, activation: Any, backend: Any, **given: Any) -> Any:
    return expert_swiglu(ExpertOperands(**grouped(given)), scale=scale, activation=activation, backend=backend)


def run_shared(**given: Any) -> Any:
    return swiglu(**grouped(given))


@st.composite
def gru_arguments(draw: Any) -> dict[str, Any]:
    torch.manual_seed(draw(seeds))
    dtype, state = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    given = gru_operands.arguments(draw(st.integers(0, 6)), draw(st.integers(1, 7)), dtype, state)
    return {**given, "candidate_activation": draw(st.sampled_from(["sigmoid", "tanh"])), "backend": draw(backends)}


@st.composite
def rethinking_arguments(draw: Any) -> dict[str, Any]:
    """x, the spec and the rest by their names; of the weights the parts by name, with a dot before a tensor's own."""
    routers = draw(st.sampled_from(["layer", "layer", "linear", None]))
    experts = 1 if routers is None else draw(st.integers(1, 4))
    rounds = draw(st.integers(1, 3))
    weights = make_layer(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 11)),
        experts,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)) if rounds > 1 else None,
        bias=draw(st.booleans()),
        routers=routers,
        dora=draw(st.booleans()),
        seed=draw(seeds),
    )
    dtype = draw(st.sampled_from(DTYPES))
    weights = cast_layer(weights, dtype)
    spec = {
        "rounds": rounds,
        "top_k": draw(st.integers(1, experts)),
        "scale": 1.5,
        "activation": draw(st.sampled_from(["silu", "gelu", "relu2"])),
        "normalize": draw(st.booleans()),
        "candidate_input": draw(st.sampled_from(["expert_output", "hidden_state"])),
        "candidate_activation": draw(st.sampled_from(["sigmoid", "tanh"])),
        "dropout": 0.0,
    }
    tokens, hidden = draw(st.integers(0, 5)), weights.experts.lora.gate_A.shape[2]
    return {
        "x": randn(tokens, hidden, dtype=dtype, seed=draw(seeds)),
        **flat(weights),
        **spec,
        "fold": draw(st.sampled_from(["auto", "always", "never"])),
        "backend": draw(backends),
    }


def flat(weights: LayerWeights) -> dict[str, Any]:
    """A layer's tensors by their paths: ``base.gate``, ``experts.router``, ``experts.lora.up_A``, ``gru.update``."""
    found: dict[str, Any] = {}

    def enter(path: str, value: Any) -> None:
        if not hasattr(value, "_asdict"):
            found[path] = value
            return
        for name, part in value._asdict().items():
            enter(f"{path}.{name}", part)

    for name, part in weights._asdict().items():
        enter(name, part)
    return found


def layer_of(given: dict[str, Any]) -> LayerWeights:
    """The inverse of `flat`."""

    def part(kind: type, path: str) -> Any:
        own = {name.removeprefix(f"{path}.") for name in given if name.startswith(f"{path}.")}
        return kind(**{name: given[f"{path}.{name}"] for name in own if "." not in name}) if own else given.get(path)

    lora = part(ExpertWeights, "experts.lora")
    lora = lora._replace(magnitudes=part(Magnitudes, "experts.lora.magnitudes"))
    experts: Any = SingleExpert(lora)
    if "experts.router" in given:
        experts = ChosenExperts(lora, given["experts.router"])
    elif any(name.startswith("experts.linear_routers") for name in given):
        experts = MixedExperts(lora, part(LinearRouters, "experts.linear_routers"))
    return LayerWeights(part(DenseMLP, "base"), experts, part(GRUWeights, "gru"))


def run_rethink(**given: Any) -> Any:
    spec = RethinkingSpec(**{name: given[name] for name in RethinkingSpec._fields})
    options = {name: given[name] for name in ("fold", "backend")}
    return rethink(given["x"], layer_of(given), spec, **options)


order_arguments = st.integers(1, 3).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 255), min_size=k, max_size=k), min_size=1, max_size=9).map(
        lambda rows: {"experts": torch.tensor(rows, dtype=torch.int64)}
    )
)

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


def check_order(given: dict[str, Any], found: Tensor) -> None:
    rows = [sorted(row) for row in given["experts"].tolist()]
    keys = [(row[0], row[1] if len(row) > 1 else 0, place) for place, row in enumerate(rows)]
    assert found.tolist() == [place for _, _, place in sorted(keys)]


OPERATORS = {
    "topk_softmax_routing": Operator(topk_softmax_routing, logits_arguments(), check_routing),
    "route_tokens": Operator(route_tokens, routing_arguments(), check_routing),
    "expert_swiglu": Operator(run_experts, expert_arguments(), check_experts),
    "swiglu": Operator(run_shared, shared_arguments(), check_shared),
    "gru_step": Operator(gru_step, gru_arguments(), check_gru),
    "rethink": Operator(run_rethink, rethinking_arguments(), check_rethinking),
    "expert_order": Operator(expert_order, order_arguments, check_order),
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
