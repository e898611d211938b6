"""Adapters of the methods on one model: what cannot be attached, several side by side, and the base given back."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model

from graphmoe_model import FusedGraphMoEFFN
from tests.model.method_models import (
    adapted,
    config,
)
from tests.model.method_oracles import FORMS
from tests.model.tiny_models import logits, tiny_model

pytestmark = pytest.mark.methods

ALL = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize("num_experts", [[2, 4, 4], "2-4-4", "2-4-4-2"], ids=str)
@pytest.mark.parametrize("form", ["mixlora", "loramoe", "mola"])
def test_counts_that_do_not_fit_the_model_change_nothing(form, num_experts):
    """Three numbers for two layers: refused before any module was replaced."""
    base = tiny_model()
    modules = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match="layers"):
        adapted(form, base, num_experts=num_experts)
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert torch.equal(logits(base), logits(tiny_model()))


@pytest.mark.parametrize("form", ["loramoe", "graphmoe-doramoe"])
def test_attention_of_a_method_without_it_is_refused(form):
    """LoRAMoE puts nothing on the attention: asked for it, it says so and changes nothing."""
    base = tiny_model()
    modules = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match="q_proj"):
        adapted(form, base, target_modules=["mlp", "q_proj"])
    assert {name: id(module) for name, module in base.named_modules()} == modules


@ALL
def test_disable_delete_and_unload_give_the_base_back(form):
    """The base's logits to the bit, and after unload its own modules."""
    base = tiny_model()
    expected, modules = logits(base), {name: id(module) for name, module in base.named_modules()}
    model = adapted(form, base)
    model.add_adapter("second", config(form))
    changed = logits(model)
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), changed)
    assert model.unload() is base
    assert {name: id(module) for name, module in base.named_modules()} == modules
    assert torch.equal(logits(base), expected)
    model = adapted(form, base)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model), expected)  # a PeftModel without any adapter refuses to run


@pytest.mark.parametrize(
    ("first", "second"),
    [("lora", "graphmoe-mixdora"), ("mixdora", "loramoe"), ("loramoe", "graphmoe-mola"), ("moda", "doramoe")],
)
def test_a_second_adapter_of_another_method(first, second):
    """One model holds adapters of several methods: each gives what it gives alone, whatever the attention has."""
    model = adapted(first)
    alone = logits(model)
    model.add_adapter("second", config(second))
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    changed = logits(model)
    assert not torch.allclose(changed, alone)
    model.delete_adapter("default")
    assert torch.equal(logits(model), changed)


@pytest.mark.parametrize(("first", "second"), [("mixlora", "mola"), ("mola", "mixlora"), ("moda", "dora")])
def test_lora_and_experts_do_not_share_a_projection(first, second):
    """One would wrap the other, and be saved by names under which nothing loads: refused in either order, by name, and
    nothing is left behind. On the MLPs alone the two go together."""
    model = adapted(first)
    expected, names = logits(model), {name for name, _ in model.named_modules()}
    with pytest.raises(ValueError, match=r"q_proj has .* from the adapter default.*target_modules=\['mlp'\]"):
        model.add_adapter("second", config(second))
    assert {name for name, _ in model.named_modules()} == names
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    model.add_adapter("second", config(second, target_modules=["mlp"]))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("form", ["dora", "mixdora", "moda"])
def test_a_module_with_a_zero_row_can_be_left_out_as_the_error_says(form):
    """The error names what to leave out, and left out it is no error."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    with pytest.raises(ValueError, match=r"DoRA on model.layers.1.mlp.up_proj.* leave (\S+) out") as error:
        get_peft_model(model, config(form))
    (module,) = re.findall(r"leave (\S+) out", str(error.value))
    get_peft_model(model, config(form, exclude_modules=[module]))
    assert isinstance(model.model.layers[0].mlp, FusedGraphMoEFFN)
    assert not isinstance(model.model.layers[1].mlp, FusedGraphMoEFFN)
