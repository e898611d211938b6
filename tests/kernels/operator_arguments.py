"""Right arguments of every operator, drawn by name, and the calls of those that take them grouped."""

from __future__ import annotations

from typing import Any

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
    expert_swiglu,
    rethink,
    swiglu,
)
from graphmoe_kernels.testing import cast_layer, make_layer
from tests.kernels import expert_operands, gru_operands

DTYPES = [torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]
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
