"""`optimizer_groups`: every trainable parameter in exactly one group, which has the rate that was asked for it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from graphmoe_model import GraphMoEConfig, optimizer_groups
from graphmoe_tables.methods import PRESETS
from tests.model.tiny_models import tiny_model, tiny_peft_model

RATES = {"experts": 1e-3, "router": 2e-3, "gru": 3e-3, "attention": 4e-3}
# A word of a parameter's own name, behind the adapter's, -> its group; the first that is found counts.
WORDS = {"gru": "gru", "router": "router", "experts": "experts"}


def expected(name: str) -> str:
    """The group, told by the name alone."""
    if "modules_to_save" in name:
        return "other"
    if "self_attn" in name and ".router." not in name:
        return "attention"
    return next(group for word, group in WORDS.items() if f".{word}." in name)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_trainable_parameter_is_in_one_group_with_its_rate(preset):
    """A parameter in no group would never be trained; torch refuses one in two only where the optimizer is made."""
    config = GraphMoEConfig.from_preset(preset, r=4, lora_alpha=8, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model(), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    present = {expected(name) for name in trained}
    groups = optimizer_groups(
        model, learning_rate=5e-3, weight_decay=0.1, **{name: rate for name, rate in RATES.items() if name in present}
    )
    torch.optim.AdamW(groups)
    names = {id(p): name for name, p in trained.items()}
    found = {names[id(p)]: (group["name"], group["lr"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert found == {name: (expected(name), (RATES | {"other": 5e-3})[expected(name)]) for name in trained}
    assert all(group["weight_decay"] == 0.1 for group in groups)


def test_a_group_without_a_rate_has_the_general_one():
    groups = optimizer_groups(tiny_peft_model(), learning_rate=1e-4, gru=1e-5)
    assert {group["name"]: group["lr"] for group in groups} == {
        "experts": 1e-4,
        "router": 1e-4,
        "gru": 1e-5,
        "attention": 1e-4,
    }


def test_what_is_asked_for_in_vain_is_refused():
    with pytest.raises(ValueError, match=r"a learning rate for gru was given .*only experts, router, attention; leave"):
        optimizer_groups(tiny_peft_model(rounds=1), learning_rate=1e-4, gru=1e-5)
    with pytest.raises(ValueError, match="the learning rate router must be above 0, got 0; to freeze"):
        optimizer_groups(tiny_peft_model(), learning_rate=1e-4, router=0)
    with pytest.raises(ValueError, match="no parameter of this LlamaForCausalLM is trainable"):
        optimizer_groups(tiny_model().requires_grad_(False), learning_rate=1e-4)
