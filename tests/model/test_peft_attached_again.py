"""A model that has an adapter already, and is adapted again as if it had none: a notebook's cell, run twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from tests.model.attaching import attach, snapshot
from tests.model.tiny_models import logits, tiny_config, tiny_model


def with_experts() -> PeftModel:
    return attach(tiny_model(), init_lora_weights=False)


def with_lora() -> PeftModel:
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(tiny_model(), LoraConfig(**settings))


def adapt_the_base(model: PeftModel, folder: str) -> nn.Module:
    return get_peft_model(model.get_base_model(), tiny_config())


def adapt_the_wrapped(model: PeftModel, folder: str) -> nn.Module:
    return get_peft_model(model, tiny_config())


def inject(model: PeftModel, folder: str) -> nn.Module:
    return inject_adapter_in_model(tiny_config(), model.get_base_model())


def load(model: PeftModel, folder: str) -> nn.Module:
    return PeftModel.from_pretrained(model.get_base_model(), folder)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("again", [adapt_the_base, adapt_the_wrapped, inject, load])
@pytest.mark.parametrize("first", [with_experts, with_lora])
def test_the_adapter_that_is_there_stays_whole(first: Callable, again: Callable, tmp_path):
    """PEFT enters a second configuration of the same name in place of the first; a refusal after that would leave an
    adapter, trained perhaps, that neither runs nor saves."""
    attach(tiny_model()).save_pretrained(tmp_path / "other")
    model = first()
    expected = logits(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"an adapter 'default' already \(\w+\), which would be lost; .*unload\(\)"):
        again(model, str(tmp_path / "other"))
    assert snapshot(model) == before
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("coefficient", [0.01, 0.0])
def test_a_peft_model_is_told_of_add_adapter(coefficient):
    """A PeftModel around a PeftModel would have one adapter's names inside the other's."""
    model = with_experts()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"a PeftModel already, with default; .* model.add_adapter\('new', config\)"):
        get_peft_model(model, tiny_config(router_aux_loss_coef=coefficient), adapter_name="new")
    assert snapshot(model) == before
    model.add_adapter("new", tiny_config(router_aux_loss_coef=coefficient))
    assert list(model.peft_config) == ["default", "new"]


def test_after_unload_the_name_is_free():
    model = with_experts()
    base = model.unload()
    expected = logits(base)
    assert torch.allclose(logits(attach(base)), expected, atol=1e-5)
