"""The methods and presets of a GraphMoEConfig: their defaults, what each refuses, and experts by layer."""

from __future__ import annotations

import re

import pytest
from peft import PeftConfig

from graphmoe_model import GraphMoEConfig
from graphmoe_tables.methods import METHODS, PRESETS

pytestmark = pytest.mark.methods


@pytest.mark.parametrize(
    "method, num_experts, top_k, rounds, coefficient",
    [("lora", 1, 1, 1, 0.0), ("mixlora", 8, 2, 3, 0.01), ("loramoe", 6, 6, 3, 0.0), ("mola", 8, 2, 3, 0.01)],
)
def test_what_is_left_out_has_the_methods_default(method, num_experts, top_k, rounds, coefficient):
    """One default for all would give LoRA eight experts, or LoRAMoE a loss that its dense routing makes constant."""
    config = GraphMoEConfig(method=method)
    assert (config.num_experts, config.top_k) == (num_experts, top_k)
    assert (config.rounds, config.router_aux_loss_coef) == (rounds, coefficient)


def test_the_method_is_mixlora_with_rethinking_unless_named():
    """What a GraphMoEConfig() was before there were other methods, it is still."""
    assert GraphMoEConfig() == GraphMoEConfig(method="mixlora", num_experts=8, top_k=2, rounds=3)
    assert GraphMoEConfig().title == "GraphMoE(MixLoRA)"


@pytest.mark.parametrize("num_experts, top_k", [(4, 4), ([2, 5], 5), ("2-4", 4)])
def test_dense_routing_mixes_as_many_experts_as_there_are(num_experts, top_k):
    """LoRAMoE has no top-k to choose: leaving it out and giving the number of experts are the same."""
    assert GraphMoEConfig(method="loramoe", num_experts=num_experts).top_k == top_k
    assert GraphMoEConfig(method="loramoe", num_experts=num_experts, top_k=top_k).top_k == top_k


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
        (
            {"method": "loramoe", "router_aux_loss_scope": "global"},
            "method='loramoe' has no load-balance loss (its experts are all used by every token), so "
            "router_aux_loss_scope='global' has no place; leave it out",
        ),
        ({"method": "mola", "num_experts": [8, 1]}, "top_k=2 exceeds num_experts=1; a token cannot choose more"),
        ({"num_experts": "1-8"}, "top_k=2 exceeds num_experts=1"),
    ],
)
def test_what_a_method_does_not_have_is_refused(settings, message):
    """Ignored, it would train another method than the one that was asked for."""
    with pytest.raises(ValueError, match=re.escape(message)):
        GraphMoEConfig(**settings)


@pytest.mark.parametrize("given", ["8", "2-", "-2", "2--4", "0-2", "02-4", "2-4-x", "2,4", "", " 2-4"])
def test_a_wrong_pattern_of_experts_is_refused(given):
    """Nothing is guessed from a typing error."""
    with pytest.raises(ValueError, match=f"num_experts='{given}' is no pattern; expected numbers joined by '-', such"):
        GraphMoEConfig(num_experts=given)


@pytest.mark.parametrize("given", [0, -1, 2.0, True, [], [8, 0], [8, "4"], [8, True], [8, 2.0], (8, 4), {"mlp": 4}])
def test_a_wrong_number_of_experts_is_refused(given):
    """True is no number of experts, and an empty list no layers."""
    message = "num_experts must be an integer of at least 1, a list of them (one for every decoder layer) or a pattern"
    with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(f"got {given!r}")):
        GraphMoEConfig(num_experts=given)


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


def test_there_is_a_preset_for_every_method_of_the_paper():
    """And each is the method that its name says."""
    assert {name: GraphMoEConfig.from_preset(name).title for name in PRESETS} == TITLES


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


def test_settings_overrule_a_preset():
    """Those that are named; the others stay, and the preset itself does."""
    config = GraphMoEConfig.from_preset("mixlora", r=32, rounds=2, task_type="CAUSAL_LM", use_dora=True)
    assert (config.r, config.rounds, config.task_type, config.lora_alpha) == (32, 2, "CAUSAL_LM", 32)
    assert config.title == "GraphMoE(MixDoRA)"
    assert GraphMoEConfig.from_preset("mixlora").r == 16
    with pytest.raises(ValueError, match="method='lora' has one expert"):
        GraphMoEConfig.from_preset("lora", num_experts=8)


@pytest.mark.parametrize("name", ["MixLoRA", "graphmoe-lora", ""])
def test_an_unknown_preset_is_refused_with_the_known_ones(name):
    """GraphMoE on LoRA is none of the paper's; it can be asked for by method and rounds."""
    with pytest.raises(ValueError, match=f"unknown preset '{name}'; there are lora, dora, mixlora, .*graphmoe-moda$"):
        GraphMoEConfig.from_preset(name)
    assert GraphMoEConfig(method="lora", rounds=3).title == "GraphMoE(LoRA)"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_its_file(preset, tmp_path):
    """Also what a method fills in itself: another method's default in its place would be refused, or worse, taken."""
    config = GraphMoEConfig.from_preset(preset)
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


def test_a_preset_keeps_its_method():
    """Another method's experts and top-k would come along: the preset of that method is meant."""
    with pytest.raises(
        ValueError, match="preset 'graphmoe-mixlora' is of another method than 'loramoe'; choose one of"
    ):
        GraphMoEConfig.from_preset("graphmoe-mixlora", method="loramoe")
    assert GraphMoEConfig.from_preset("graphmoe-mixlora", method="mixlora").title == "GraphMoE(MixLoRA)"
