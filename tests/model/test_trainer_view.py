"""What trainers read of the base's configuration: the active adapter's routers, and nothing stays in the base."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from graphmoe_model import router_loss
from tests.model.attaching import attach, dense_and_sparse_model
from tests.model.router_losses import IDS
from tests.model.tiny_models import VOCABULARY, tiny_config, tiny_model, tiny_peft_model

FIELDS = ("output_router_logits", "router_aux_loss_coef")


def declared(config: object) -> tuple[object, ...] | None:
    """The two fields, or None where a configuration has neither."""
    present = [hasattr(config, name) for name in FIELDS]
    assert all(present) or not any(present)
    return tuple(getattr(config, name) for name in FIELDS) if all(present) else None


def test_the_active_adapter_decides():
    """A trainer that is made after set_adapter must weight with that adapter's coefficient."""
    model = tiny_peft_model(router_aux_loss_coef=0.02)
    model.add_adapter("none", tiny_config(router_aux_loss_coef=0.0))
    model.add_adapter("large", tiny_config(router_aux_loss_coef=0.5))
    assert declared(model.config) == (True, 0.02)
    model.set_adapter("none")
    assert declared(model.config) is None
    model.set_adapter("large")
    assert declared(model.config.get_text_config()) == (True, 0.5)
    with model.disable_adapter():
        assert declared(model.config) is None


def test_the_base_configuration_stays_as_it_is(tmp_path):
    """Saved beside the adapter, or shared with another model, two fields more would make later trainers fail."""
    base = tiny_model()
    before = base.config.to_dict()
    model = get_peft_model(base, tiny_config())
    model.config.use_cache = False  # as Trainer does: through the view, into the configuration
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not set(FIELDS) & set(written)
    assert base.config.to_dict() == {**before, "use_cache": False}
    assert declared(base.config) is None
    plain = get_peft_model(AutoModelForCausalLM.from_config(base.config), LoraConfig(task_type="CAUSAL_LM"))
    assert declared(plain.config) is None


def test_the_view_passes_for_the_configuration():
    """Auto classes, isinstance, copies and pickles meet what they know."""
    model = tiny_peft_model()
    config, own = model.config, model.get_base_model().config
    assert isinstance(config, LlamaConfig)
    assert config == own
    assert repr(config) == repr(own)
    assert type(AutoModelForCausalLM.from_config(config)) is type(model.get_base_model())
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(copied) is LlamaConfig
        assert copied.to_dict() == own.to_dict()
        assert declared(copied) is None


def test_a_base_with_routers_and_no_router_loss_gets_the_adapter_s():
    """DeepSeek-V3 can return its routers' logits, in newer Transformers, but has no loss that would be mixed up."""
    model = attach(dense_and_sparse_model(), layers_to_transform=[0], init_lora_weights=False).train()
    assert declared(model.config) == (True, 0.01)
    assert asked(model) > 0
    with torch.no_grad():
        plain = dense_and_sparse_model().train()(input_ids=IDS, labels=IDS).loss
    fresh = attach(dense_and_sparse_model(), layers_to_transform=[0]).train()
    with torch.no_grad():
        loss = fresh(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(loss, plain + router_loss(fresh))


def test_a_copied_model_has_its_own_view():
    """A reference model is a copy; its active adapter is not the original's."""
    model = tiny_peft_model()
    model.add_adapter("large", tiny_config(router_aux_loss_coef=0.5))
    twin = copy.deepcopy(model)
    twin.set_adapter("large")
    assert declared(twin.config) == (True, 0.5)
    assert declared(model.config) == (True, 0.01)


@pytest.mark.parametrize("first, second", [(0.01, 10.0), (10.0, 0.01), (0.01, 0.0)])
def test_a_running_trainer_follows_set_adapter(first, second):
    """TRL reads the coefficient once and weights aux_loss by it: what it is given makes the active one count."""
    model = tiny_peft_model(router_aux_loss_coef=first, init_lora_weights=False).train()
    model.add_adapter("second", tiny_config(router_aux_loss_coef=second, init_lora_weights=False))
    told = model.config.router_aux_loss_coef
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = asked(model)
    with torch.no_grad():
        model.peft_config["second"].router_aux_loss_coef = told  # what it was told: then it gets Eq. 8 as it is
        balance = asked(model)
    assert told == first
    torch.testing.assert_close(told * outputs["second"], second * balance)
    assert outputs["default"] > 0


def asked(model: torch.nn.Module) -> torch.Tensor:
    """aux_loss as TRL asks for it: its fused head returns an output with an open field."""
    base = model.get_base_model()

    def forward(*args, **kwargs):
        kwargs.pop("fused_lm_head")
        outputs = type(base).forward(base, *args, **kwargs)
        outputs["aux_loss"] = None
        return outputs

    base.forward = forward
    try:
        return model(input_ids=IDS, labels=IDS, output_router_logits=True, fused_lm_head=True).aux_loss
    finally:
        del base.forward


def test_transformers_own_adapter_management_is_followed():
    """Its set_adapter and delete_adapter do not pass by PEFT's tuner; hooks and coefficients must not stay."""
    model = tiny_model()
    fields = set(vars(model.config))
    model.add_adapter(tiny_config(router_aux_loss_coef=0.5), "first")
    model.add_adapter(tiny_config(router_aux_loss_coef=0.0), "second")
    model.train()
    second = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(second, tiny_model()(input_ids=IDS, labels=IDS).loss)
    model.set_adapter("first")
    assert model(input_ids=IDS, labels=IDS).loss > second
    model.delete_adapter("first")
    assert model._forward_hooks
    model.delete_adapter("second")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert set(vars(model.config)) - fields <= {"_name_or_path"}
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, second)


@dataclass
class Sizes:
    """A configuration that is none of Transformers."""

    vocab_size: int = VOCABULARY


@pytest.mark.parametrize("config", [{"vocab_size": VOCABULARY}, Sizes()], ids=["dict", "dataclass"])
def test_a_configuration_of_another_kind_is_no_view(config, tmp_path):
    """A model outside of Transformers: PEFT reads its dict or dataclass as such, when it saves."""

    def model() -> nn.Module:
        blocks = nn.Sequential(tiny_model().model.layers[0].mlp)
        blocks.config = config
        return blocks

    adapted = get_peft_model(model(), tiny_config(task_type=None, target_modules=["0"], init_lora_weights=False))
    assert adapted.config is config
    adapted.save_pretrained(tmp_path)
    x = torch.randn(3, 32)
    assert torch.allclose(PeftModel.from_pretrained(model(), tmp_path)(x), adapted.eval()(x), atol=1e-5)
