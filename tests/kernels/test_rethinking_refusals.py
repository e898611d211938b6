"""What the recurrence refuses: settings, arguments and weights that would be ignored, broadcast or never chosen."""

import functools

import pytest
import torch

from graphmoe_kernels import (
    ExpertWeights,
    FoldCache,
    LayerWeights,
    RethinkingSpec,
    rethink,
    rethink_folded,
    rethink_literal,
)
from tests.kernels.cases import ODD, layer

BASE = RethinkingSpec(rounds=3, top_k=2, scale=1.5)


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, ODD.hidden, dtype=torch.float64)


REFUSALS = [
    ({"rounds": 0}, {}, "rounds must be at least 1, got 0"),
    ({"rounds": 3}, {"gru": None}, r"rounds=3 needs GRU weights; there are none \(rounds=1 needs none\)"),
    ({"rounds": 1}, {}, "rounds=1 has no step between rounds and would ignore the GRU weights; pass gru=None"),
    ({"candidate_input": "y"}, {}, "candidate_input 'y'; expected one of 'expert_output', 'hidden_state'"),
    ({"candidate_activation": "relu"}, {}, "candidate_activation 'relu'; expected one of 'sigmoid', 'tanh'"),
    ({"activation": "swoosh"}, {}, "unknown activation 'swoosh'; known are"),
    ({"top_k": 6}, {}, r"top_k must lie in 1\.\.5 .*got 6"),
    ({"top_k": 0}, {}, r"top_k must lie in 1\.\.5 .*got 0"),
    ({"scale": float("inf")}, {}, "scale must be a finite number, got inf"),
    ({"activation": 3}, {}, "unknown activation 3; known are"),
    ({"dropout": 1.0}, {}, r"dropout must lie in \[0, 1\), got 1.0"),
    ({"dropout": -0.5}, {}, r"dropout must lie in \[0, 1\), got -0.5"),
]


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("settings, parts, message", REFUSALS)
def test_refused_settings_are_named(settings, parts, message, fold):
    """Every setting that no layer can run with is answered by its name and by what was expected."""
    with pytest.raises(ValueError, match=message):
        rethink(tokens(4), layer(BASE)._replace(**parts), BASE._replace(**settings), fold=fold)


CALL_REFUSALS = [
    ({"fold": "sometimes"}, ValueError, "unknown fold 'sometimes'; expected one of 'auto', 'always', 'never'"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
    ({"x": torch.zeros(2, 3, ODD.hidden)}, ValueError, r"x must be \[tokens, 13\].*got \[2, 3, 13\]; flatten"),
    ({"x": torch.zeros(ODD.hidden)}, ValueError, r"x must be \[tokens, 13\].*got \[13\]"),
    ({"x": torch.zeros(2, 12)}, ValueError, r"x must be \[tokens, 13\].*got \[2, 12\]"),
    ({"x": torch.zeros(2, ODD.hidden).long()}, TypeError, "x must be floating point, got torch.int64"),
    ({"x": torch.zeros(2, ODD.hidden, device="meta")}, ValueError, "x is on meta, the experts on cpu"),
    ({"x": [[0.0] * ODD.hidden]}, TypeError, "x must be a tensor, got list"),
    ({"x": tokens(4).float()}, TypeError, "x is torch.float32, the base MLP's weights torch.float64; cast one"),
    ({"weights": layer(BASE).experts}, TypeError, "weights must be LayerWeights, got ChosenExperts"),
    ({"spec": {"rounds": 3}}, TypeError, "spec must be RethinkingSpec, got dict"),
    ({"spec": BASE._replace(rounds=2.0)}, TypeError, "rounds must be an integer, got 2.0"),
    ({"spec": BASE._replace(top_k="2")}, TypeError, "top_k must be an integer, got '2'"),
    ({"spec": BASE._replace(scale="1")}, TypeError, "scale must be a number, got '1'"),
    ({"spec": BASE._replace(normalize="no")}, TypeError, "normalize must be True or False, got 'no'"),
    ({"fold": ["auto"]}, ValueError, r"unknown fold \['auto'\]"),
    ({"cache": {}}, TypeError, "cache must be FoldCache or None, got dict"),
]


@pytest.mark.parametrize("change, error, message", CALL_REFUSALS)
def test_refused_arguments_are_named(change, error, message):
    """Every wrong argument of `rethink` is answered by its name and by what was expected."""
    arguments = {"x": tokens(4), "weights": layer(BASE), "spec": BASE} | change
    with pytest.raises(error, match=message):
        rethink(**arguments)


def spoilt(part: str, **changes) -> LayerWeights:
    """A layer with some tensors of one of its parts replaced; a callable makes one from what was there."""
    mixed = part == "experts.linear_routers"
    weights = layer(BASE, bias=True, dora="lora" in part, routers="linear" if mixed else "layer")
    return replaced(weights, [own for own in part.split(".") if own], changes)


def replaced(group, path: list[str], changes: dict):
    if path:
        return group._replace(**{path[0]: replaced(getattr(group, path[0]), path[1:], changes)})
    return group._replace(
        **{k: change(getattr(group, k)) if callable(change) else change for k, change in changes.items()}
    )


WEIGHT_REFUSALS = {
    "router with fewer rows": (("experts", {"router": torch.zeros(4, 13).double()}), r"router must be \[5, 13\] for 5"),
    "router with more rows": (
        ("experts", {"router": torch.zeros(6, 13).double()}),
        r"router must be \[5, 13\].*\[6, 13\]",
    ),
    "router is a list": (("experts", {"router": [0.0]}), "router must be a tensor, got list"),
    "no router": (("experts", {"router": None}), "5 experts need a router"),
    "a linear's router": (
        ("experts.linear_routers", {"down": lambda t: t[:3]}),
        r"linear_routers.down must be \[5, 21\].*a row for each; got",
    ),
    "one magnitude missing": (
        ("experts.lora.magnitudes", {"up": None}),
        "magnitudes.up is missing: pass all three, or ",
    ),
    "one magnitude alone": (
        ("experts.lora.magnitudes", {"gate": None, "down": None}),
        "magnitudes.gate and magnitudes.down is missing",
    ),
    "magnitude of one expert": (
        ("experts.lora.magnitudes", {"down": lambda t: t[0]}),
        r"magnitudes.down must be \[5, 13\]",
    ),
    "A of another rank": (
        ("experts.lora", {"up_A": lambda t: t[:, :2]}),
        r"up_A must be \[5, 3, 13\] .*got \[5, 2, 13\]",
    ),
    "B of one expert": (("experts.lora", {"gate_B": lambda t: t[0]}), "gate_B must have three dimensions"),
    "no experts": (
        ("experts.lora", dict.fromkeys(ExpertWeights._fields[:6], lambda t: t[:0])),
        "got 0 experts, D=13 and F=21",
    ),
    "F = 0": (
        ("base", {"gate": lambda t: t[:0], "up": lambda t: t[:0], "down": lambda t: t[:, :0]}),
        "got 5 experts, D=13 and F=0",
    ),
    # One tensor that is wrong is the one that is named, also where it is the first.
    "gate_A of another D": (
        ("experts.lora", {"gate_A": lambda t: t[:, :, 1:]}),
        r"^gate_A must be \[5, 3, 13\] for .*D=13 and F=21; got \[5, 3, 12\]",
    ),
    "gate_A of another rank": (("experts.lora", {"gate_A": lambda t: t[:, 1:]}), r"^gate_A must be \[5, 3, 13\]"),
    "gate_A of fewer experts": (("experts.lora", {"gate_A": lambda t: t[1:]}), r"^gate_A must be \[5, 3, 13\]"),
    "gate_B of another F": (("experts.lora", {"gate_B": lambda t: t[:, 1:]}), r"^gate_B must be \[5, 21, 3\]"),
    "gate_B without columns": (("experts.lora", {"gate_B": lambda t: t[:, :0]}), r"^gate_B must be \[5, 21, 3\]"),
    "base.gate transposed": (("base", {"gate": lambda t: t.T}), r"^base.gate must be \[21, 13\]"),
    "bias of a narrower GRU": (("gru", {"candidate_bias": lambda t: t[1:]}), r"^gru.candidate_bias must be \[6\]"),
    "experts as integers": (
        ("experts.lora", {"down_B": lambda t: t.long()}),
        "down_B must be floating point, got torch.int64",
    ),
    "sparse": (("experts.lora", {"down_B": lambda t: t.to_sparse()}), "down_B must be a dense tensor, got layout"),
    "experts elsewhere": (("experts.lora", {"down_A": lambda t: t.to("meta")}), "down_A is on meta, gate_A on cpu"),
    "bias of shape [1]": (("base", {"gate_bias": lambda t: t[:1]}), r"base.gate_bias must be \[21\] .*got \[1\]"),
    "bias of another dtype": (
        ("base", {"down_bias": lambda t: t.half()}),
        "base.down_bias is torch.float16, base.gate",
    ),
    "down transposed": (("base", {"down": lambda t: t.T}), r"base.down must be \[13, 21\]"),
    "no base": (("", {"base": None}), "base must be a BaseMLP, such as DenseMLP, got NoneType"),
    "experts are a tuple": (("", {"experts": (1, 2)}), r"experts must be of a kind \(ChosenExperts, .*got tuple"),
    "GRU is a tensor": (("", {"gru": torch.zeros(3)}), "gru must be GRUWeights or None, got Tensor"),
    "GRU of width 0": (("gru", {"candidate_bias": lambda t: t[:0]}), r"gru.candidate_bias must be \[G\]"),
    "GRU of another D": (("gru", {"update": lambda t: t[:, :-1]}), r"gru.update must be \[6, 19\] .*got \[6, 18\]"),
    "output transposed": (("gru", {"output": lambda t: t.T}), r"gru.output must be \[13, 6\]"),
}


@pytest.mark.parametrize("case", WEIGHT_REFUSALS)
def test_refused_weights_are_named(case):
    """What would be ignored (DoRA half given), never chosen (a router's missing rows) or broadcast (a bias of [1])."""
    (part, changes), message = WEIGHT_REFUSALS[case]
    runs = {
        "folded": rethink_folded,
        "literal": rethink_literal,
        "cached": lambda x, w, s: rethink(x, w, s, cache=FoldCache(lambda: w)),
    }
    for fold in ("auto", "always", "never"):
        runs[fold] = functools.partial(rethink, fold=fold)
    for run in runs.values():
        with pytest.raises((TypeError, ValueError), match=message):
            run(tokens(4), spoilt(part, **changes), BASE)
