"""What a GraphMoEConfig accepts, what it refuses and how, and that it survives its file."""

import re
from dataclasses import fields

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model

from graphmoe_model import GraphMoEConfig, GraphMoEPeftType
from graphmoe_model.config import SUPPORTED_LORA_FIELDS
from graphmoe_model.methods import METHODS, PRESETS
from tests.model.tiny_models import tiny_config, tiny_model

# Every field of LoraConfig that GraphMoE does not implement. A field in neither list is new in PEFT: find out what it
# does to a GraphMoE model, then put it here or into SUPPORTED_LORA_FIELDS (with a test).
REFUSED = {
    *("fan_in_fan_out", "bias", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "velora_config", "alora_invocation_tokens", "use_qalora", "qalora_group_size"),
    *("monteclora_config", "layer_replication", "runtime_config", "lora_bias", "target_parameters", "use_bdlora"),
    *("arrow_config", "kasa_config", "ensure_weight_tying"),
}


def test_every_field_of_lora_config_is_known():
    """A field that a new PEFT brings must not slip in without anyone having looked at it."""
    known = {field.name for field in fields(LoraConfig)}
    assert known - SUPPORTED_LORA_FIELDS == REFUSED
    assert known >= SUPPORTED_LORA_FIELDS, "SUPPORTED_LORA_FIELDS names fields that LoraConfig no longer has"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_unsupported_option_is_refused_by_name(name):
    """Ignoring an option would train something else than was asked for."""
    with pytest.raises(ValueError, match=rf"does not implement.*\b{name}="):
        GraphMoEConfig(**{name: "set"})


def test_all_unsupported_options_are_named_at_once():
    """One message, not one per attempt."""
    with pytest.raises(ValueError, match=r"use_qalora=True.*lora_bias=True.*init_lora_weights='pissa'"):
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
        ({"gru_hidden_scale": float("inf")}, "gru_hidden_scale must be a number that is positive, got inf"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef must be a number that is 0 or positive"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob must be True or False, got 'no'"),
        ({"use_rslora": 1}, "use_rslora must be True or False"),
        ({"use_dora": "yes"}, "use_dora must be True or False, got 'yes'"),
        ({"method": "moe"}, "unknown method 'moe'; expected one of 'lora', 'mixlora', 'loramoe', 'mola'"),
        ({"candidate_input": "x"}, "unknown candidate_input 'x'; expected one of 'expert_output', 'hidden_state'"),
        ({"candidate_activation": "relu"}, "unknown candidate_activation 'relu'"),
        ({"router_aux_loss": "none"}, "unknown router_aux_loss 'none'"),
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


@pytest.mark.methods
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_its_file(preset, tmp_path):
    """Also what a method fills in itself: another method's default in its place would be refused, or worse, taken."""
    config = GraphMoEConfig.from_preset(preset)
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


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


# --- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.methods
@pytest.mark.parametrize(
    "method, num_experts, top_k, rounds, coefficient",
    [("lora", 1, 1, 1, 0.0), ("mixlora", 8, 2, 3, 0.01), ("loramoe", 6, 6, 3, 0.0), ("mola", 8, 2, 3, 0.01)],
)
def test_what_is_left_out_has_the_methods_default(method, num_experts, top_k, rounds, coefficient):
    """One default for all would give LoRA eight experts, or LoRAMoE a loss that its dense routing makes constant."""
    config = GraphMoEConfig(method=method)
    assert (config.num_experts, config.top_k) == (num_experts, top_k)
    assert (config.rounds, config.router_aux_loss_coef) == (rounds, coefficient)


@pytest.mark.methods
def test_the_method_is_mixlora_with_rethinking_unless_named():
    """What a GraphMoEConfig() was before there were other methods, it is still."""
    assert GraphMoEConfig() == GraphMoEConfig(method="mixlora", num_experts=8, top_k=2, rounds=3)
    assert GraphMoEConfig().title == "GraphMoE(MixLoRA)"


@pytest.mark.methods
@pytest.mark.parametrize("num_experts, top_k", [(4, 4), ([2, 5], 5), ("2-4", 4)])
def test_dense_routing_mixes_as_many_experts_as_there_are(num_experts, top_k):
    """LoRAMoE has no top-k to choose: leaving it out and giving the number of experts are the same."""
    assert GraphMoEConfig(method="loramoe", num_experts=num_experts).top_k == top_k
    assert GraphMoEConfig(method="loramoe", num_experts=num_experts, top_k=top_k).top_k == top_k


@pytest.mark.methods
@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"method": "lora", "num_experts": 8},
            "method='lora' has one expert and no router, got num_experts=8 and top_k=1; leave both out, or choose "
            "method='mixlora' or method='loramoe' or method='mola'",
        ),
        ({"method": "lora", "top_k": 2}, "got num_experts=1 and top_k=2; leave both out"),
        (
            {"method": "loramoe", "top_k": 2},
            "its routing is dense), so top_k=2 has no place; leave top_k out, or choose method='mixlora' or "
            "method='mola'",
        ),
        (
            {"method": "loramoe", "router_aux_loss_coef": 0.01},
            "method='loramoe' has no load-balance loss (its experts are all used by every token): router_aux_loss_coef "
            "must be 0, got 0.01",
        ),
        (
            {"method": "lora", "router_aux_loss_coef": 0.5},
            "method='lora' has no load-balance loss (it has no router): router_aux_loss_coef must be 0, got 0.5",
        ),
        ({"method": "mola", "num_experts": [8, 1]}, "top_k=2 exceeds num_experts=1; a token cannot choose more"),
        ({"num_experts": "1-8"}, "top_k=2 exceeds num_experts=1"),
    ],
)
def test_what_a_method_does_not_have_is_refused(settings, message):
    """Ignored, it would train another method than the one that was asked for."""
    with pytest.raises(ValueError, match=re.escape(message)):
        GraphMoEConfig(**settings)


@pytest.mark.methods
@pytest.mark.parametrize("given", ["8", "2-", "-2", "2--4", "0-2", "02-4", "2-4-x", "2,4", "", " 2-4"])
def test_a_wrong_pattern_of_experts_is_refused(given):
    """Nothing is guessed from a typing error."""
    with pytest.raises(ValueError, match=f"num_experts='{given}' is no pattern; expected numbers joined by '-', such"):
        GraphMoEConfig(num_experts=given)


@pytest.mark.methods
@pytest.mark.parametrize("given", [0, -1, 2.0, True, [], [8, 0], [8, "4"], [8, True], [8, 2.0], (8, 4), {"mlp": 4}])
def test_a_wrong_number_of_experts_is_refused(given):
    """True is no number of experts, and an empty list no layers."""
    message = "num_experts must be an integer of at least 1, a list of them (one for every decoder layer) or a pattern"
    with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(f"got {given!r}")):
        GraphMoEConfig(num_experts=given)


@pytest.mark.methods
@pytest.mark.parametrize(
    "num_experts, by_layer",
    [
        (5, [5, 5, 5, 5, 5, 5, 5, 5]),
        ([2, 3, 4, 5, 6, 7, 8, 9], [2, 3, 4, 5, 6, 7, 8, 9]),
        ("2-4-6-8", [2, 2, 4, 4, 6, 6, 8, 8]),
        ("8-2", [8, 8, 8, 8, 2, 2, 2, 2]),
        ([4] * 8, [4] * 8),
    ],
)
def test_experts_by_layer(num_experts, by_layer):
    """A pattern goes in groups from the first layer on: MoLA's 2-4-6-8 has the fewest experts at the bottom."""
    assert GraphMoEConfig(method="mola", num_experts=num_experts).experts_by_layer(8) == by_layer


@pytest.mark.methods
@pytest.mark.parametrize(
    "num_experts, layers, message",
    [
        ([2, 4], 3, "num_experts lists 2 layers, the model has 3 decoder layers; give one number for each"),
        ([2, 4], 1, "num_experts lists 2 layers, the model has 1 decoder layers"),
        ("2-4-6-8", 6, "num_experts='2-4-6-8' asks for 4 equal groups of layers, but the model has 6"),
        ("2-4-6-8", 2, "asks for 4 equal groups of layers, but the model has 2; give a list with a number for every"),
    ],
)
def test_experts_that_do_not_fit_the_layers_are_refused(num_experts, layers, message):
    """Cut off or repeated, they would train other layers than were meant."""
    with pytest.raises(ValueError, match=message):
        GraphMoEConfig(num_experts=num_experts).experts_by_layer(layers)


TITLES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "mixlora": "MixLoRA",
    "mixdora": "MixDoRA",
    "loramoe": "LoRAMoE",
    "doramoe": "DoRAMoE",
    "mola": "MoLA",
    "moda": "MoDA",
    "graphmoe-mixlora": "GraphMoE(MixLoRA)",
    "graphmoe-mixdora": "GraphMoE(MixDoRA)",
    "graphmoe-loramoe": "GraphMoE(LoRAMoE)",
    "graphmoe-doramoe": "GraphMoE(DoRAMoE)",
    "graphmoe-mola": "GraphMoE(MoLA)",
    "graphmoe-moda": "GraphMoE(MoDA)",
}


@pytest.mark.methods
def test_there_is_a_preset_for_every_method_of_the_paper():
    """And each is the method that its name says."""
    assert {name: GraphMoEConfig.from_preset(name).title for name in PRESETS} == TITLES


@pytest.mark.methods
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_papers_settings(preset):
    """GraphMoE, Table 2: alpha twice the rank, dropout 0.05; three rounds and a GRU of a tenth with rethinking."""
    config = GraphMoEConfig.from_preset(preset)
    base = {"dora": "lora", "mixdora": "mixlora", "doramoe": "loramoe", "moda": "mola"}
    name = preset.removeprefix("graphmoe-")
    ranks = {"lora": (80, 1, 1), "mixlora": (16, 8, 2), "loramoe": (24, 6, 6), "mola": (10, 8, 2)}
    assert config.method == base.get(name, name)
    assert config.use_dora == (name in base)
    assert (config.r, config.num_experts, config.top_k) == ranks[config.method]
    assert (config.lora_alpha, config.lora_dropout) == (2 * config.r, 0.05)
    assert config.rounds == (1 if name == preset else 3)
    assert config.gru_hidden_scale == 0.1
    assert config.router_aux_loss_coef == METHODS[config.method].router_aux_loss_coef


@pytest.mark.methods
def test_settings_overrule_a_preset():
    """Those that are named; the others stay, and the preset itself does."""
    config = GraphMoEConfig.from_preset("mixlora", r=32, rounds=2, task_type="CAUSAL_LM", use_dora=True)
    assert (config.r, config.rounds, config.task_type, config.lora_alpha) == (32, 2, "CAUSAL_LM", 32)
    assert config.title == "GraphMoE(MixDoRA)"
    assert GraphMoEConfig.from_preset("mixlora").r == 16
    with pytest.raises(ValueError, match="method='lora' has one expert"):
        GraphMoEConfig.from_preset("lora", num_experts=8)


@pytest.mark.methods
@pytest.mark.parametrize("name", ["MixLoRA", "graphmoe-lora", ""])
def test_an_unknown_preset_is_refused_with_the_known_ones(name):
    """GraphMoE on LoRA is none of the paper's; it can be asked for by method and rounds."""
    with pytest.raises(ValueError, match=f"unknown preset '{name}'; there are lora, dora, mixlora, .*graphmoe-moda$"):
        GraphMoEConfig.from_preset(name)
    assert GraphMoEConfig(method="lora", rounds=3).title == "GraphMoE(LoRA)"
