"""What a GraphMoEConfig accepts, what it refuses and how, and that it survives its file."""

import re
from dataclasses import fields

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model

from graphmoe_model import GraphMoEConfig, GraphMoEPeftType
from graphmoe_model.config.graphmoe_config import SUPPORTED_LORA_FIELDS
from graphmoe_model.config.refused_options import REFUSED_OPTIONS
from tests.model.tiny_models import tiny_config, tiny_model


def test_every_field_of_lora_config_is_known():
    """A field in neither list is new in PEFT: find out what it does to a GraphMoE model, then put it into one."""
    known = {field.name for field in fields(LoraConfig)}
    assert known - SUPPORTED_LORA_FIELDS == set(REFUSED_OPTIONS)
    assert known >= SUPPORTED_LORA_FIELDS, "SUPPORTED_LORA_FIELDS names fields that LoraConfig no longer has"


@pytest.mark.parametrize("name", sorted(REFUSED_OPTIONS))
def test_an_unsupported_option_is_refused_by_name(name):
    """Ignoring an option would train something else than was asked for; the message says why not, and what instead."""
    refusal = REFUSED_OPTIONS[name]
    with pytest.raises(ValueError, match=re.escape(f"\n- {name}='set': {refusal.reason}; {refusal.instead}")):
        GraphMoEConfig(**{name: "set"})


def test_an_option_that_peft_has_newly_is_refused(monkeypatch):
    """A newer PEFT may bring a field that nobody here has looked at: it must not be ignored."""
    known = {name: refusal for name, refusal in REFUSED_OPTIONS.items() if name != "use_bdlora"}
    monkeypatch.setattr("graphmoe_model.config.refused_options.REFUSED_OPTIONS", known)
    with pytest.raises(ValueError, match="use_bdlora='set': this version of GraphMoE does not know it"):
        GraphMoEConfig(use_bdlora="set")


def test_all_unsupported_options_are_named_at_once():
    """One message, not one per attempt."""
    with pytest.raises(ValueError, match=r"(?s)use_qalora=True.*lora_bias=True.*init_lora_weights='pissa'"):
        GraphMoEConfig(use_qalora=True, lora_bias=True, init_lora_weights="pissa")


def test_an_option_set_afterwards_is_refused_when_attaching():
    """A dataclass can be changed after its checks have run."""
    config = tiny_config()
    config.lora_bias = True
    with pytest.raises(ValueError, match="lora_bias=True"):
        get_peft_model(tiny_model(), config)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "eva", "orthogonal"])
def test_named_initialisations_are_refused(init):
    """They are made for one linear, not for experts."""
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
        GraphMoEConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": 2.5}, "r must be an integer"),
        ({"num_experts": True}, "num_experts must be an integer"),
        ({"top_k": 9}, "top_k=9 exceeds num_experts=8"),
        ({"rounds": 0}, "rounds must be an integer of at least 1"),
        ({"rank_pattern": {"mlp": 0}}, r"rank_pattern\['mlp'\] must be an integer of at least 1, got 0"),
        ({"alpha_pattern": {"mlp": "8"}}, r"alpha_pattern\['mlp'\] must be a number that is positive, got '8'"),
        ({"lora_alpha": 0}, "lora_alpha must be a number that is positive"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be a number that is in \[0, 1\), got 1.0"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be a number"),
        ({"gru_hidden_scale": 0.0}, "gru_hidden_scale must be a number that is positive"),
        (
            {"gru_hidden_scale": float("inf")},
            "gru_hidden_scale must be .* positive and at most 16, got inf",
        ),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef must be a number that is 0 or positive"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob must be True or False, got 'no'"),
        ({"use_rslora": 1}, "use_rslora must be True or False"),
        ({"use_dora": "yes"}, "use_dora must be True or False, got 'yes'"),
        ({"method": "moe"}, "unknown method 'moe'; expected one of 'lora', 'mixlora', 'loramoe', 'mola'"),
        ({"candidate_input": "x"}, "unknown candidate_input 'x'; expected one of 'expert_output', 'hidden_state'"),
        ({"candidate_activation": "relu"}, "unknown candidate_activation 'relu'"),
        ({"router_aux_loss": "none"}, "unknown router_aux_loss 'none'"),
        (
            {"router_aux_loss_scope": "world"},
            "unknown router_aux_loss_scope 'world'; expected one of 'local', 'global'",
        ),
        ({"fold": "yes"}, "unknown fold 'yes'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(settings, message):
    """Each message names the option, what it was and what it may be."""
    with pytest.raises(ValueError, match=message):
        GraphMoEConfig(**settings)


def test_a_config_survives_its_file(tmp_path):
    """Everything that decides what an adapter computes must be in adapter_config.json."""
    config = tiny_config(
        use_dora=True,
        rounds=2,
        num_experts=[3, 2],
        top_k=1,
        candidate_input="hidden_state",
        candidate_activation="tanh",
        norm_topk_prob=False,
        use_rslora=True,
        target_modules=["q_proj", "mlp"],
        layers_to_transform=[1],
        rank_pattern={"mlp": 2},
        alpha_pattern={"q_proj": 3},
        exclude_modules=["v_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices=[5, 7],
    )
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, GraphMoEConfig)
    assert loaded == config
    assert loaded.peft_type is GraphMoEPeftType.GRAPHMOE


def test_scaling_follows_the_rank():
    """alpha / r, or alpha / sqrt(r) with use_rslora, for the config's rank or a pattern's."""
    assert GraphMoEConfig(r=16, lora_alpha=32).scaling() == 2
    assert GraphMoEConfig(r=16, lora_alpha=32).scaling(r=4, lora_alpha=2) == 0.5
    assert GraphMoEConfig(r=16, lora_alpha=32, use_rslora=True).scaling() == 8


def test_a_gru_without_width_is_refused_only_where_there_is_one():
    """int(0.1 * 8) is 0: an error that says which scale would do; with one round there is no GRU."""
    with pytest.raises(ValueError, match=r"GRU of width 0 at hidden size 8; it must be at least 0.125"):
        GraphMoEConfig().gru_width(8)
    assert GraphMoEConfig(rounds=1).gru_width(8) == 0
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        GraphMoEConfig().gru_width(0)
