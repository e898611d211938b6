"""Layers over quantised linears: folded, literal, and over the dense weights that the quantised ones stand for."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.layers.linear import RoutedLoRALinear
from graphmoe_model.storage.dequantise import dense_weight
from tests.model.method_oracles import adapter_state, form_config, move_from_start
from tests.quant.bases import (
    EXACT,
    LINEARS,
    dense_linear,
    dense_twin,
    hidden_states,
    plain_linear,
    quantised_mlp,
)

pytestmark = pytest.mark.quant

KINDS = pytest.mark.parametrize("kind", LINEARS)
TOLERANCE = 1e-5
# Every routing with rounds, and DoRA where an expert is a whole MLP and where each linear mixes its own.
FORMS = ["graphmoe-mixlora", "graphmoe-mixdora", "graphmoe-loramoe", "graphmoe-moda"]


def layer_over(base: nn.Module, form: str, **options) -> nn.Module:
    """A layer in training whose terms all count."""
    kind = FusedGraphMoEFFN if hasattr(base, "down_proj") else RoutedLoRALinear
    layer = kind(base, form_config(form, **options))
    move_from_start(adapter_state(layer))
    return layer


def twin(layer: nn.Module, base: nn.Module, fold: str) -> nn.Module:
    """The same adapter over another base."""
    settings = copy.deepcopy(layer.lora_graphmoe["default"].config)
    settings.fold = fold
    other = type(layer)(base, settings)
    other.lora_graphmoe["default"].load_state_dict(adapter_state(layer))
    return other.train(layer.training)


def outcome(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y and the gradients of the input and of every parameter, for one fixed upstream gradient."""
    x = x.clone().requires_grad_()
    y = layer(x)
    names, parameters = zip(*adapter_state(layer).items(), strict=True)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(y, (x, *parameters), upstream)
    return dict(zip(("y", "x", *names), (y.detach(), *gradients), strict=True))


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    off = {name: relative_error(found[name], expected[name]) for name in expected}
    assert not {name: error for name, error in off.items() if error > TOLERANCE}, off


@pytest.mark.parametrize("form", FORMS)
@KINDS
def test_folded_literal_and_dense_are_equal(kind, form):
    """A fold of packed numbers, of rounded scales or of the wrong layout is no product of the base's weights."""
    base = quantised_mlp(kind, bias=kind != "hqq" and form == "graphmoe-moda", fused=form == "graphmoe-loramoe")
    dense = dense_twin(base)
    folded, x = layer_over(base, form, fold="always"), hidden_states()
    literal = twin(folded, base, "never")
    oracle = twin(folded, dense, "never")
    expected = outcome(oracle, x)
    assert_alike(outcome(folded, x), expected)
    assert_alike(outcome(literal, x), expected)
    if kind in EXACT:
        with torch.no_grad():
            y = oracle.eval()(x)
            for layer in (folded.eval(), folded, literal.eval()):  # the second time on the kept fold
                assert relative_error(layer(x), y) <= TOLERANCE


@KINDS
@pytest.mark.parametrize("form", ["mola", "moda"])
def test_a_linear_with_experts_is_that_over_the_dense_weight(kind, form):
    """MoLA's experts on an attention projection; DoRA's norms are those of the weight that the numbers stand for."""
    base = LINEARS[kind](plain_linear(bias=True))
    layer, x = layer_over(base, form), hidden_states()
    oracle = twin(layer, dense_linear(base), "auto")
    assert_alike(outcome(layer, x), outcome(oracle, x))
    if kind in EXACT:
        with torch.no_grad():
            for _ in range(2):
                assert relative_error(layer.eval()(x), oracle.eval()(x)) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_int8_in_evaluation_errs_no_more_than_the_literal_loop(form):
    """LLM.int8() rounds its inputs in evaluation, so folded and literal differ by that; neither is further off."""
    base = quantised_mlp("int8")
    folded, x = layer_over(base, form, fold="always").eval(), hidden_states(64)
    literal, oracle = twin(folded, base, "never"), twin(folded, dense_twin(base), "never")
    with torch.no_grad():
        exact = oracle(x)
        assert relative_error(folded(x), exact) <= 2 * relative_error(literal(x), exact) < 0.1


@KINDS
@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_adapter_changes_nothing(kind, form):
    """In training, and in evaluation where a difference in the last bit cannot move an input to another step."""
    base = quantised_mlp(kind)
    x = hidden_states()
    before = {mode: base.train(mode)(x) for mode in (True, False)}
    layer = FusedGraphMoEFFN(base, form_config(form, init_lora_weights=True))
    for mode, expected in before.items():
        allowed = TOLERANCE if mode or kind in EXACT else 0.02
        assert relative_error(layer.train(mode)(x), expected) <= allowed


def _parts(linear: nn.Module) -> dict[str, object]:
    """All that a linear holds, and where: parameters by identity, tensors beside them by identity, flags by value."""
    found: dict[str, object] = {}
    for owner, prefix in (
        (linear, ""),
        (getattr(linear, "weight", None), "weight."),
        (vars(linear).get("state"), "state."),
    ):
        for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
            if name not in ("support_avx512bf16_for_cpu", "training"):
                found[prefix + name] = id(value) if isinstance(value, Tensor) else repr(value)
    found["parameters"] = [id(p) for p in linear._parameters.values()]
    return found


@KINDS
def test_attaching_and_folding_change_no_linear(kind):
    """PEFT's helper gives 8-bit linears another parameter, and a first forward settles dtypes and where scales are."""
    base = quantised_mlp(kind)
    linears = [m for m in base.children() if hasattr(m, "in_features")]
    before = [_parts(linear) for linear in linears]
    layer = FusedGraphMoEFFN(base, form_config("graphmoe-mixdora"))
    dense = layer._weights("default").base.dense()
    assert dense.gate.shape == (96, 64)
    assert [_parts(linear) for linear in linears] == before
    assert [m for m in base.children() if hasattr(m, "in_features")] == linears


def _linears(base: nn.Module) -> list:
    return [base] if hasattr(base, "in_features") else [m for m in base.children() if hasattr(m, "in_features")]


def _scales(linear) -> list[Tensor]:
    """What its numbers are multiplied by, wherever the kind keeps it after a forward."""
    if hasattr(linear, "W_q"):
        return [linear.meta["scale"]]
    if hasattr(linear, "state"):
        return [linear.state.SCB]
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return [linear.weight.scale]
    return [state.offset, state.state2.absmax] if state.nested else [state.absmax]


@KINDS
@torch.no_grad()
@pytest.mark.parametrize("change", ["other weights", "other scales"])
@pytest.mark.parametrize("which", ["mlp", "linear"])
def test_what_is_kept_follows_the_base(kind, which, change):
    """torchao's tensors have no address and count no versions, and scales are written without touching a weight."""

    def make() -> nn.Module:
        return quantised_mlp(kind) if which == "mlp" else LINEARS[kind](plain_linear())

    base, other = make(), make()
    layer, x = layer_over(base, "graphmoe-moda" if which == "mlp" else "moda").eval(), hidden_states()
    before = layer(x)
    for linear, new in zip(_linears(base), _linears(other), strict=True):
        if change == "other scales":
            for scale in _scales(linear):
                scale.mul_(1.5)
        elif kind == "hqq":
            linear.W_q, linear.meta = new.W_q, new.meta
        else:
            linear.weight = new.weight
    after = layer(x)
    assert relative_error(after, before) > 0.01
    layer.refold()
    assert torch.equal(layer(x), after)


@KINDS
@pytest.mark.parametrize("form", FORMS)
def test_no_dense_weight_outlives_the_forward(kind, form, monkeypatch):
    """Kept for the backward pass, the dense weights of all layers would take what quantising them saved."""
    made: list[weakref.ref] = []

    def recorded(linear: nn.Module) -> Tensor:
        weight = dense_weight(linear)
        made.append(weakref.ref(weight.untyped_storage()))
        return weight

    monkeypatch.setattr("graphmoe_model.layers.base_mlp.dense_weight", recorded)
    layer = layer_over(quantised_mlp(kind), form, fold="always")
    made.clear()
    y = layer(hidden_states())
    assert made
    assert not any(storage() is not None for storage in made)
    made.clear()
    y.sum().backward()
    assert made, "the backward pass made them again"
    with torch.no_grad():
        layer.eval()(hidden_states())
    assert not any(storage() is not None for storage in made)
