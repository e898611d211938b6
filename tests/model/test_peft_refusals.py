"""What cannot be attached is refused with its reason, and leaves the model as it was: a corrected retry works."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from graphmoe_model import GraphMoEConfig
from tests.model.attaching import attach, snapshot
from tests.model.tiny_models import logits, tiny_config, tiny_model, train_step

# Settings that a config accepts and a tiny Llama does not, with what the message must say.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "GRU without width": ({"gru_hidden_scale": 1e-9}, "layers.0.mlp: gru_hidden_scale=1e-09 gives a GRU of width 0"),
    "token outside": (
        {"trainable_token_indices": [3, 64]},
        "trainable_token_indices: model.embed_tokens has 64 tokens, so there is no token 64; call resize_token_embed",
    ),
    "token's module": ({"trainable_token_indices": {"nothing": [1]}}, "no module is called nothing; there are .*norm"),
    "token's weight": (
        {"trainable_token_indices": {"model.norm": [1]}},
        "model.norm (LlamaRMSNorm) is no embedding or output head with a weight of its own",
    ),
    "tokens and the whole": (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        "model.embed_tokens is in modules_to_save too; train all of its rows or some, not both",
    ),
    "tokens and LoRA": (
        {"trainable_token_indices": [1], "target_modules": ["mlp", "embed_tokens"]},
        "model.embed_tokens is in target_modules too",
    ),
    "saved nothing": ({"modules_to_save": ["nothing"]}, "of the base model is called nothing; there are .*lm_head"),
    "saved router": ({"modules_to_save": ["router"]}, "no module of the base model is called router"),
    "saved inside": (
        {"modules_to_save": ["gate_proj"]},
        "gate_proj means model.layers.*.mlp.gate_proj, and the adapter has model.layers.*.mlp; a module is adapted or",
    ),
    "saved by a suffix": (
        {"modules_to_save": ["proj"]},
        "proj means model.layers.0.self_attn.q_proj, and the adapter has model.layers.0.self_attn.q_proj",
    ),
    "saved around": ({"modules_to_save": ["odel"]}, "odel means model, and the adapter has model.layers."),
    "saved list": (
        {"modules_to_save": ["yers"]},
        "modules_to_save: yers is a list of modules (model.layers), which has no forward to run",
    ),
    "saved own part": (
        {"modules_to_save": ["norm", "ora_A"], "target_modules": ["mlp", "q_proj"]},
        "no module of the base model is called ora_A",
    ),
    "saved twice": (
        {"modules_to_save": ["self_attn", "self_attn.q_proj"], "target_modules": ["mlp"]},
        "self_attn.q_proj means model.layers.0.self_attn.q_proj, which lies inside model.layers.0.self_attn, saved as",
    ),
    "rank of nothing": (
        {"rank_pattern": {"nothing": 4}},
        "rank_pattern: 'nothing' matches none of the adapted modules, which are .*model.layers.{0, 1}.mlp",
    ),
    "alpha of nothing": ({"alpha_pattern": {"layers.7.mlp": 4}}, "alpha_pattern: 'layers.7.mlp' matches none"),
    "rank by order": (
        {"rank_pattern": {"mlp": 2, "layers.1.mlp": 4}},
        "the keys 'mlp' and 'layers.1.mlp' both match model.layers.1.mlp, and PEFT takes the first, which is 'mlp' now",
    ),
    "experts by layer": ({"num_experts": [2, 2, 2]}, "num_experts lists 3 layers, the model has 2 decoder layers"),
    "experts elsewhere": (
        {"num_experts": [2, 2], "target_modules": ["mlp", "lm_head"]},
        "num_experts=[2, 2] has no number for lm_head",
    ),
    "no such layer": ({"layers_to_transform": [1, 7]}, "without any target module: [7]; selected are .*layers.1.mlp"),
    "a norm": ({"target_modules": ["mlp", "input_layernorm"]}, "Target module LlamaRMSNorm.* is not supported"),
    "no MLP": ({"target_modules": ["q_proj"]}, "selects no gated MLP (the model's gated MLPs are called mlp)"),
}  # fmt: skip


def pattern(message: str) -> str:
    """The message as it is, but for ``.*``."""
    return ".*".join(map(re.escape, message.split(".*")))


def to_the_base(model: nn.Module, config: GraphMoEConfig) -> nn.Module:
    return get_peft_model(model, config)


def by_transformers(model: nn.Module, config: GraphMoEConfig) -> nn.Module:
    model.add_adapter(config, "new")
    return model


def as_a_second(model: nn.Module, config: GraphMoEConfig) -> nn.Module:
    model.add_adapter("new", config)
    model.set_adapter("new")
    return model


def with_a_first() -> nn.Module:
    """A model that has an adapter already, on its first layer, with a norm that it trains as it is."""
    norm, settings = "layers.0.post_attention_layernorm", {"layers_to_transform": [0], "init_lora_weights": False}
    return attach(tiny_model(), target_modules=["mlp"], modules_to_save=[norm], **settings)


ROUTES: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
    "get_peft_model": (tiny_model, to_the_base),
    "Transformers": (tiny_model, by_transformers),
    "a second adapter": (with_a_first, as_a_second),
}


@pytest.fixture(scope="module", params=ROUTES)
def route(request) -> tuple[nn.Module, Callable]:
    make, add = ROUTES[request.param]
    return make(), add


@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_a_refusal_leaves_the_model_as_it_was(route, settings, message):
    """One model refuses everything, one thing after the other: nothing may be left of any."""
    model, add = route
    before, config = snapshot(model), tiny_config(**settings)
    given = copy.deepcopy(vars(config))
    with pytest.raises((TypeError, ValueError), match=pattern(message)):
        add(model, config)
    assert snapshot(model) == before
    given["base_model_name_or_path"] = config.base_model_name_or_path  # PEFT enters it first, for whoever asks
    assert vars(config) == given


def test_a_corrected_retry_works(route):
    """Runs after all the refusals above, on the same models: they adapt and train as a fresh one does."""
    model, add = route
    with pytest.raises(ValueError, match="no token 64"):
        add(model, tiny_config(trainable_token_indices=[64]))
    adapted = add(model, tiny_config(trainable_token_indices=[5], init_lora_weights=False))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("trainable_tokens_delta" in name for name in trained)
    before = logits(adapted)
    train_step(adapted)
    assert not torch.equal(logits(adapted), before)


def test_a_model_with_routers_of_its_own_is_refused_whole():
    """Two router losses would be mixed up: refused before hooks and layers are attached."""
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = tiny_model("mixtral", **settings)
    for layer in model.model.layers:
        layer.mlp = tiny_model().model.layers[0].mlp
    before = snapshot(model)
    with pytest.raises(ValueError, match="router_aux_loss_coef=0"):
        attach(model)
    assert snapshot(model) == before


def test_an_interrupt_is_undone_too(monkeypatch):
    """Ctrl-C while a large model is being adapted."""
    model, calls = tiny_model(), []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    from graphmoe_model import GraphMoEModel

    original = GraphMoEModel._create_and_replace
    before = snapshot(model)
    monkeypatch.setattr(GraphMoEModel, "_create_and_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, tiny_config())
    assert len(calls) == 5
    assert snapshot(model) == before


def test_the_adapters_own_router_is_not_the_bases():
    """PEFT would wrap both: the base's router is named in full, or not at all."""
    model = tiny_model()
    model.model.layers[1].router = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"own router, .*; name the base model's in full: model.layers.1.router$"):
        attach(model, modules_to_save=["router"])
    adapted = attach(model, modules_to_save=["model.layers.1.router"])
    wrapped = [name for name, module in adapted.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    assert wrapped == ["base_model.model.model.layers.1.router"]


@pytest.mark.parametrize("adapter", [tiny_config(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")])
def test_a_bare_model_for_a_generating_task(adapter):
    """PEFT's own class for the task fails after it has attached; ours is refused before, as LoRA's is not."""
    from transformers import AutoModel

    model = AutoModel.from_config(tiny_model().config)
    before = snapshot(model)
    if isinstance(adapter, GraphMoEConfig):
        with pytest.raises(ValueError, match="task_type='CAUSAL_LM' is for models that generate, and this LlamaModel"):
            get_peft_model(model, adapter)
        assert snapshot(model) == before
        assert attach(model, task_type="FEATURE_EXTRACTION")
    else:
        with pytest.raises(AttributeError):
            get_peft_model(model, adapter)
        assert snapshot(model) != before


def test_modules_that_another_adapter_has_wrapped():
    """A head that one adapter trains whole cannot get LoRA from the next, nor the other way about."""
    model = attach(tiny_model(), modules_to_save=["lm_head"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="target_modules select lm_head, which another adapter of this model trains"):
        model.add_adapter("second", tiny_config(target_modules=["mlp", "lm_head"]))
    assert snapshot(model) == before
    other = attach(tiny_model(), target_modules=["mlp", "lm_head"])
    with pytest.raises(ValueError, match="lm_head means lm_head, which another adapter of this model adapts"):
        other.add_adapter("second", tiny_config(modules_to_save=["lm_head"]))
    assert list(other.peft_config) == ["default"]
