"""How many parameters each method trains, against formulas of their own, and that each is counted once."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig
from graphmoe_model.base_models import MODEL_SHAPES, load_config, model_config
from graphmoe_model.parameters import COMPONENTS, adapter_parameters, parameters_by_component
from graphmoe_tables.methods import PRESETS
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model

# Llama-3-8B by hand: (in, out) of each linear of a layer, and how many layers there are.
HIDDEN, INTERMEDIATE, KEYS, LAYERS = 4096, 14336, 1024, 32
ATTENTION = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]
MLP = [(HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
GRU_WIDTH = 409  # int(0.1 * 4096)

# The published parameters of the paper's Table 1, as shares 2.6%, 3.0%, 3.2%, 2.7% and 5.9% of 8,030,261,248.
TOTALS = {
    "lora": 209_715_200,
    "mixlora": 241_172_480,
    "loramoe": 259_129_344,
    "mola": 219_676_672,
    "graphmoe-mixlora": 471_678_336,
}


def pairs(linears: list[tuple[int, int]], rank: int) -> int:
    """A and B of every linear."""
    return sum(rank * (inputs + outputs) for inputs, outputs in linears)


def inputs(linears: list[tuple[int, int]]) -> int:
    return sum(i for i, _ in linears)


def outputs(linears: list[tuple[int, int]]) -> int:
    return sum(o for _, o in linears)


# A layer's parameters without those of DoRA and GRU, and what DoRA adds.
BASES = {
    "lora": {"attention LoRA": pairs(ATTENTION, 80), "experts": pairs(MLP, 80)},
    "mixlora": {"attention LoRA": pairs(ATTENTION, 16), "experts": 8 * pairs(MLP, 16), "routers": 8 * HIDDEN},
    "loramoe": {"experts": 6 * pairs(MLP, 24), "routers": 6 * inputs(MLP)},
    "mola": {
        "attention experts": 8 * pairs(ATTENTION, 10),
        "attention routers": 8 * inputs(ATTENTION),
        "experts": 8 * pairs(MLP, 10),
        "routers": 8 * inputs(MLP),
    },
}
MAGNITUDES = {
    "dora": outputs(ATTENTION) + outputs(MLP),
    "mixdora": outputs(ATTENTION) + 8 * outputs(MLP),
    "doramoe": 6 * outputs(MLP),
    "moda": 8 * outputs(ATTENTION) + 8 * outputs(MLP),
}
PLAIN = dict(zip(MAGNITUDES, BASES, strict=True))  # a DoRA form -> its plain form
# update and reset gate, candidate (with a bias), output projection
GRU = 3 * GRU_WIDTH * (GRU_WIDTH + HIDDEN) + GRU_WIDTH + HIDDEN * GRU_WIDTH


def by_hand(preset: str) -> dict[str, int]:
    base = preset.removeprefix("graphmoe-")
    layer = dict(BASES[PLAIN.get(base, base)])
    if base in MAGNITUDES:
        layer["magnitudes"] = MAGNITUDES[base]
    if preset != base:
        layer["GRU"] = GRU
    return {component: LAYERS * count for component, count in layer.items()}


def without_zeros(components: dict[str, int]) -> dict[str, int]:
    return {component: count for component, count in components.items() if count}


@pytest.mark.methods
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_on_llama_3_8b(preset):
    """Another count is another method than the paper's; on the meta device, as 8 billion weights would not fit."""
    found = adapter_parameters(GraphMoEConfig.from_preset(preset), model_config("llama-3-8b"))
    assert without_zeros(found.components) == by_hand(preset)
    assert found.total == sum(by_hand(preset).values())
    assert found.base == 8_030_261_248
    assert found.share == found.total / 8_030_261_248


@pytest.mark.parametrize("preset", TOTALS)
def test_the_formulas_give_the_papers_totals(preset):
    """The formulas above are checked themselves: against totals that give the shares in the paper."""
    assert sum(by_hand(preset).values()) == TOTALS[preset]


@pytest.mark.methods
def test_experts_by_layer_are_counted_layer_by_layer():
    """MoLA's 2-4-6-8: the mean over all layers would hide a pattern that was not applied to a router."""
    pattern = GraphMoEConfig.from_preset("mola", num_experts="2-4-6-8")
    found = adapter_parameters(pattern, model_config("llama-3-8b")).components
    assert found["experts"] == (2 + 4 + 6 + 8) * LAYERS // 4 * pairs(MLP, 10)
    assert found["attention routers"] == (2 + 4 + 6 + 8) * LAYERS // 4 * inputs(ATTENTION)


@pytest.mark.parametrize(
    "name, parameters",
    [("llama-3.2-1b", 1_235_814_400), ("llama-3-8b", 8_030_261_248), ("qwen3-4b", 4_022_468_096)],
)
def test_known_shapes_are_the_published_models(name, parameters):
    """Their published numbers of parameters: one size, a norm or the tied head wrong, and it is another one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(name))
    assert model.num_parameters() == parameters
    assert model.config.num_hidden_layers == MODEL_SHAPES[name].num_hidden_layers


def test_a_known_shape_with_other_layers():
    assert model_config("llama-3-8b", layers=3).num_hidden_layers == 3
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        model_config("llama-3-8b", layers=0)
    with pytest.raises(ValueError, match="unknown model 'llama'; there are tiny, llama-3"):
        model_config("llama")


def test_a_configuration_is_read_from_a_folder(tmp_path):
    """Of a model whose weights are not there: only the configuration is needed."""
    tiny_model(hidden_size=64).config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).hidden_size == 64
    assert load_config("tiny").hidden_size == MODEL_SHAPES["tiny"].hidden_size


SETTINGS = {
    "mixlora": {},
    "one round": {"rounds": 1},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "token embeddings": {"trainable_token_indices": [5, 6, 7]},
    "a head with LoRA": {"target_modules": ["q_proj", "mlp", "lm_head"]},
    "lora": {"method": "lora", "num_experts": None},
    "loramoe": {"method": "loramoe"},
    "mola": {"method": "mola"},
    "mixdora": {"use_dora": True},
    "moda": {"method": "mola", "use_dora": True},
}


@pytest.mark.methods
@pytest.mark.parametrize("case", SETTINGS)
def test_every_trainable_parameter_is_in_one_component(case):
    """The components' sum is the total, whatever is trained."""
    model = tiny_peft_model(**SETTINGS[case])
    found = parameters_by_component(model)
    assert tuple(found) == COMPONENTS
    assert sum(found.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_is_trained_beside_the_method_is_other():
    """Counted as experts it would hide what the method costs: a saved head, token vectors, a head's LoRA, a norm."""
    vocabulary, hidden, rank = 64, 32, 4
    plain = parameters_by_component(tiny_peft_model())
    assert plain["other"] == 0
    cases = {
        "modules_to_save": 2 * vocabulary * hidden,
        "token embeddings": 3 * hidden,
        "a head with LoRA": rank * (vocabulary + hidden),
    }
    for case, count in cases.items():
        found = parameters_by_component(tiny_peft_model(**SETTINGS[case]))
        assert found["other"] == count, case
        assert found["experts"] == plain["experts"], case
    model = tiny_peft_model()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert parameters_by_component(model) == {**plain, "other": hidden}


def test_only_the_adapter_in_training_counts():
    """A further adapter is frozen until it is made active; without any, nothing is trained."""
    model = tiny_peft_model()
    before = parameters_by_component(model)
    model.add_adapter("wide", tiny_config(r=8))
    assert parameters_by_component(model) == before
    model.set_adapter("wide")
    assert parameters_by_component(model)["experts"] == 2 * before["experts"]
    assert not any(parameters_by_component(tiny_model().requires_grad_(False)).values())


def test_a_layer_by_itself():
    """Without a model around it, the adapter's names start with the container's."""
    mlp = tiny_model().model.layers[0].mlp
    found = without_zeros(parameters_by_component(FusedGraphMoEFFN(mlp, tiny_config())))
    experts = 4 * 4 * 3 * (32 + 48)  # n, r, linears, D + F
    assert found == {"experts": experts, "routers": 4 * 32, "GRU": 3 * 8 * 40 + 8 + 32 * 8}


def test_pefts_own_dora_is_counted_as_ours():
    """PEFT calls its magnitudes otherwise; they are the attention's in MixDoRA."""
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    found = without_zeros(parameters_by_component(get_peft_model(tiny_model(), config)))
    assert found == {"attention LoRA": 2 * 2 * (32 + 32), "magnitudes": 2 * 32}


def test_counting_leaves_the_config_as_it_was():
    """Attaching writes targets and a base model's name into a config; the caller's would fit no other model then."""
    config = GraphMoEConfig.from_preset("mixlora")
    adapter_parameters(config, model_config("tiny"))
    assert config == GraphMoEConfig.from_preset("mixlora")


def test_a_saved_adapters_config_counts_as_in_training(tmp_path, recwarn):
    """It is saved for inference, where no parameter is trainable, and with the name of another model."""
    GraphMoEConfig.from_preset("mixlora", inference_mode=True, base_model_name_or_path="x").save_pretrained(
        str(tmp_path)
    )
    config = PeftConfig.from_pretrained(str(tmp_path))
    shape = model_config("tiny")
    assert adapter_parameters(config, shape) == adapter_parameters(GraphMoEConfig.from_preset("mixlora"), shape)
    assert not [str(warning.message) for warning in recwarn if "base_model_name_or_path" in str(warning.message)]


def test_the_count_is_that_of_the_model_itself():
    """On the meta device as in memory: the same modules are adapted."""
    config = tiny_config(num_experts=3, modules_to_save=["lm_head"])
    model = tiny_model()
    counted = adapter_parameters(config, model.config)
    assert counted.base == model.num_parameters()
    assert counted.components == parameters_by_component(get_peft_model(model, config))


@pytest.mark.parametrize(
    "model, settings, message",
    [
        (T5Config(), {}, "this is no causal language model: Unrecognized configuration class"),
        (AutoConfig.for_model("gpt2", n_layer=1), {}, "decoder layers"),
        (model_config("tiny"), {"gru_hidden_scale": 0.001}, "GRU of width 0 at hidden size 512"),
        (model_config("tiny"), {"task_type": "SEQ_CLS"}, "causal language models are counted, got task_type='SEQ_CLS'"),
        (model_config("tiny"), {"target_modules": ["self_attn", "mlp"]}, r"self_attn: .*gate_proj"),
    ],
)
def test_what_cannot_be_counted_says_why(model, settings, message):
    with pytest.raises(ValueError, match=message):
        adapter_parameters(GraphMoEConfig(**settings), model)


def test_nothing_is_allocated(monkeypatch):
    """8 billion parameters in memory would be the end of a laptop."""
    seen: list[nn.Module] = []

    def note(model: nn.Module) -> dict[str, int]:
        seen.append(model)
        return parameters_by_component(model)

    monkeypatch.setattr("graphmoe_model.parameters.counting.parameters_by_component", note)
    adapter_parameters(GraphMoEConfig.from_preset("graphmoe-mixdora"), model_config("tiny"))
    assert {p.device.type for p in seen[0].parameters()} == {"meta"}
