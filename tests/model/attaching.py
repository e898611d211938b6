"""Attaching an adapter to a model of some architecture, and what is adapted then."""

import pytest
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from graphmoe_model import FusedGraphMoEFFN
from tests.model.tiny_models import VOCABULARY, tiny_config, tiny_model

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


def dense_and_sparse_model() -> nn.Module:
    """A DeepSeek-V3 of one dense and one sparse layer."""
    return tiny_model(
        "deepseek_v3",
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4},
        **{"qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4},
    )


def adapted(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the FusedGraphMoEFFNs and of the LoRA layers, without PEFT's prefix."""
    named = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    ffns = {name for name, module in named.items() if isinstance(module, FusedGraphMoEFFN)}
    return ffns, {name for name, module in named.items() if isinstance(module, LoraLayer)}


def attach(model: nn.Module, **settings) -> PeftModel:
    return get_peft_model(model, tiny_config(**settings))


def snapshot(model: nn.Module) -> dict[str, object]:
    """What a refusal must leave as it was: modules, parameters, hooks, flags, adapters of wrapped layers, configs.

    Equal before and after if, and only if, the same objects are in the same places in the same state.
    """
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("config", "generation_config")}
        state[name] = (id(module), {key: _content(value) for key, value in own.items()})
    state["parameters"] = {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}
    config = getattr(model, "config", None)
    state["config"] = config.to_dict() if hasattr(config, "to_dict") else None
    state["adapters"] = {name: other.to_dict() for name, other in getattr(model, "peft_config", {}).items()}
    return state


def _content(value: object) -> object:
    """Of containers what is in them, of everything else which object it is."""
    if isinstance(value, dict):
        return id(value), [(key, _content(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    return value if isinstance(value, set | frozenset | str | int | float | bool | None) else id(value)


def refuse(model: nn.Module, error: type[Exception], message: str, **settings) -> None:
    """Attaching raises ``error`` with ``message`` and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=message):
        attach(model, **settings)
    assert snapshot(model) == before
