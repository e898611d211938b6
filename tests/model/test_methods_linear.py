"""Experts in an attention projection (MoLA, MoDA), against oracles written from the equations alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphmoe_kernels.testing import relative_error
from graphmoe_model.layers.linear import RoutedLoRALinear
from tests.model.method_checks import (
    FORWARD,
    TOKENS,
    check_budget,
    check_equal,
    hidden_states,
    outcomes,
)
from tests.model.method_oracles import (
    EXPERTS,
    HIDDEN,
    adapter_state,
    by_equations,
    form_config,
    move_from_start,
)

pytestmark = pytest.mark.methods


LINEAR_FORMS = ["mola", "moda"]


def small_linear(form: str, bias: bool = False, **options) -> RoutedLoRALinear:
    """An fp64 attention projection with experts, all its parameters away from their start."""
    layer = RoutedLoRALinear(nn.Linear(HIDDEN, 31, bias=bias).double(), form_config(form, **options))
    move_from_start(adapter_state(layer))
    return layer


@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False}, {"top_k": 1}, {"top_k": 4}, {"rounds": 3}], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_attention_linear_equals_the_equations(form, bias, options):
    """Experts in an attention projection; they run once, however many rounds the MLPs have."""
    layer = small_linear(form, bias, **options)
    shapes = {"A": (EXPERTS, 5, HIDDEN), "B": (EXPERTS, 31, 5), "router.weight": (EXPERTS, HIDDEN)}
    shapes |= {"magnitude": (EXPERTS, 31)} if form == "moda" else {}
    assert {name: tuple(p.shape) for name, p in adapter_state(layer).items()} == shapes
    for count in (TOKENS, 1):
        check_equal(layer, hidden_states(count))
    x = hidden_states(6).view(2, 3, HIDDEN)
    assert relative_error(layer(x), by_equations(layer, x)) <= FORWARD
    assert layer(hidden_states(0)).shape == (0, 31)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_fresh_attention_linear_is_the_base(form, dtype):
    """Attaching changes no projection, also in training with dropout."""
    base = nn.Linear(HIDDEN, 31).to(dtype)
    x = hidden_states(dtype=dtype)
    before = base(x).detach()
    layer = RoutedLoRALinear(base, form_config(form, init_lora_weights=True, lora_dropout=0.5))
    bound = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    for training in (True, False):
        assert relative_error(layer.train(training)(x), before) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_attention_linear_is_within_budget(form, dtype):
    """As `test_error_is_within_budget`, for experts in an attention projection."""
    check_budget(lambda: outcomes(small_linear(form, bias=True).to(dtype), dtype), dtype)


@torch.no_grad()
@pytest.mark.parametrize("name", ["A", "B", "router.weight", "magnitude", "weight"])
def test_attention_linear_follows_every_weight(name):
    """As `test_what_is_kept_follows_every_weight`, for experts in an attention projection."""
    layer, x = small_linear("moda", bias=True).eval(), hidden_states()
    before = layer(x)
    tensor = layer.base_layer.weight if name == "weight" else adapter_state(layer)[name]
    tensor.mul_(torch.rand_like(tensor) + 0.7)
    assert relative_error(layer(x), by_equations(layer, x)) <= FORWARD
    assert relative_error(layer(x), before) > 1e-6, "the change matters"


def test_attention_zero_row_is_refused():
    """DoRA on a projection with a row of zeros."""
    base = nn.Linear(HIDDEN, 31).double()
    with torch.no_grad():
        base.weight[3] = 0
    with pytest.raises(ValueError, match="row"):
        RoutedLoRALinear(base, form_config("moda", init_lora_weights=True))
