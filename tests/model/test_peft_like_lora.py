"""PEFT's features on one expert (method="lora") next to plain LoRA on the same linears: the same numbers throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from graphmoe_kernels.testing import relative_error
from tests.model.method_models import LINEARS, PROJECTIONS, as_lora, config, randomise, trained_parameters
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model, tokens

pytestmark = pytest.mark.methods


def of_mlp(entry: str) -> list[str]:
    """What an MLP's name in a field of ours is in LoRA's, which names its linears."""
    return [f"{entry.removesuffix('mlp')}mlp.{name}" for name in LINEARS] if entry.endswith("mlp") else [entry]


def for_lora(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings for LoRA on all seven linears."""
    theirs = {"target_modules": [*PROJECTIONS, *LINEARS], **settings}
    for name in ("rank_pattern", "alpha_pattern"):
        if name in settings:
            theirs[name] = {new: value for key, value in settings[name].items() for new in of_mlp(key)}
    for name in ("exclude_modules", "target_modules"):
        if name in settings:
            theirs[name] = [new for key in settings[name] for new in of_mlp(key)]
    return theirs


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "a trained head": {"modules_to_save": ["lm_head"]},
    "a trained norm": {"modules_to_save": ["model.norm"]},
    "trained tokens": {"trainable_token_indices": [3, 9, 60]},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": [5]}, "modules_to_save": ["lm_head"]},
    "some targets": {"target_modules": ["mlp", "q_proj", "v_proj"]},
    "a head with LoRA": {"target_modules": ["mlp", "q_proj", "lm_head"]},
    "one layer": {"layers_to_transform": [1]},
    "exclusions": {"exclude_modules": ["k_proj", "layers.1.mlp"]},
    "ranks and alphas": {
        "rank_pattern": {"layers.1.mlp": 2, "q_proj": 3},
        "alpha_pattern": {"layers.1.mlp": 1, "v_proj": 7},
    },
}


def pair(**settings: Any) -> tuple[PeftModel, PeftModel]:
    """Ours and LoRA's, in fp64, with the same tensors."""
    own = config("lora", **settings)
    ours = get_peft_model(tiny_model().double(), own)
    common = {"task_type": "CAUSAL_LM", "r": own.r, "lora_alpha": own.lora_alpha}
    theirs = get_peft_model(tiny_model().double(), LoraConfig(**common, **for_lora(settings)))
    randomise(ours)
    state = as_lora(trained_parameters(ours))
    assert state.keys() == trained_parameters(theirs).keys()
    theirs.load_state_dict(state, strict=False)
    return ours, theirs


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for step in range(steps):
        ids = tokens(seed=step)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("settings", FEATURES.values(), ids=FEATURES)
def test_training_and_switching_off_are_loras(settings):
    """Before and after three steps, disabled, enabled again and unloaded."""
    ours, theirs = pair(**settings)
    before = logits(theirs)
    assert relative_error(logits(ours), before) <= 1e-12
    train(ours)
    train(theirs)
    trained = logits(theirs)
    assert relative_error(trained, before) > 1e-3
    assert relative_error(logits(ours), trained) <= 1e-10
    base = logits(tiny_model().double())
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours), base)
        assert torch.equal(logits(theirs), base)
    assert relative_error(logits(ours), trained) <= 1e-10
    assert torch.equal(logits(ours.unload()), base)


def add_and_switch(model: PeftModel, second: Any) -> list[str]:
    model.add_adapter("second", second)
    model.set_adapter("second")
    return model.active_adapters


def switch_back(model: PeftModel, _: Any) -> list[str]:
    model.set_adapter("default")
    return model.active_adapters


def delete_the_active(model: PeftModel, _: Any) -> list[str]:
    model.delete_adapter("default")
    return model.active_adapters


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_adding_choosing_and_deleting_are_loras():
    """Two adapters, each with a head of its own: the same trainable names, the same one active, the same logits."""
    settings = {"modules_to_save": ["lm_head"], "init_lora_weights": True}
    ours, theirs = pair(**settings)
    own = config("lora", **settings, r=2, layers_to_transform=[0])
    seconds = (own, LoraConfig(r=2, lora_alpha=8, **for_lora({**settings, "layers_to_transform": [0]})))
    steps: list[Callable] = [add_and_switch, switch_back, delete_the_active]
    for step in steps:
        assert step(ours, seconds[0]) == step(theirs, seconds[1])
        active = ours.active_adapters[0]
        named = {name.replace(f".{active}.", ".default."): p for name, p in trained_parameters(ours).items()}
        other = {name.replace(f".{active}.", ".default.") for name in trained_parameters(theirs)}
        assert as_lora(named).keys() == other
        assert relative_error(logits(ours), logits(theirs)) <= 1e-10


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_deleting_the_active_adapter_activates_one_on_other_layers():
    """The first layer has no second adapter: PEFT would say that none is active, and fail at the next call."""
    model = tiny_peft_model(layers_to_transform=[0], modules_to_save=["lm_head"])
    model.add_adapter("second", tiny_config(layers_to_transform=[1], init_lora_weights=False))
    model.set_adapter("second")
    second = logits(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == [model.active_adapter] == ["second"]
    assert torch.equal(logits(model), second)
    train(model, 1)
    assert not torch.equal(logits(model), second)


def test_mixed_batches_have_no_counterpart():
    """LoRA runs a batch of several adapters; this is refused, and the base alone is a batch of its own."""
    ours, theirs = pair()
    names = ["default", "__base__"]
    mixed = theirs.eval()(input_ids=tokens(), adapter_names=names).logits
    with pytest.raises(ValueError, match="run one batch per adapter, with set_adapter before each"):
        ours.eval()(input_ids=tokens(), adapter_names=names)
    assert relative_error(logits(ours)[0], mixed[0]) <= 1e-10
    with ours.disable_adapter():
        assert relative_error(logits(ours)[1], mixed[1]) <= 1e-10
