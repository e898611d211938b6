"""Attaching an adapter to a model of some architecture, and what is adapted then."""

import pytest
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from graphmoe_model import FusedGraphMoEFFN
from tests.model.tiny_models import VOCABULARY, tiny_config

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def adapted(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the FusedGraphMoEFFNs and of the LoRA layers, without PEFT's prefix."""
    named = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    ffns = {name for name, module in named.items() if isinstance(module, FusedGraphMoEFFN)}
    return ffns, {name for name, module in named.items() if isinstance(module, LoraLayer)}


def attach(model: nn.Module, **settings) -> PeftModel:
    return get_peft_model(model, tiny_config(**settings))


def refuse(model: nn.Module, error: type[Exception], message: str, **settings) -> None:
    """Attaching raises ``error`` with ``message`` and leaves every module and parameter as it was."""
    before = [(name, id(module)) for name, module in model.named_modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        attach(model, **settings)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == trainable
