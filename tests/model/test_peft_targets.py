"""Which modules get an adapter, what is refused, and that a refusal leaves the model as it was."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForSequenceClassification

from tests.model.attaching import ATTENTION, SMALL, adapted, attach
from tests.model.tiny_models import logits, tiny_model


def test_defaults_are_all_attention_projections_and_mlps():
    model = attach(tiny_model())
    ffns, loras = adapted(model)
    assert ffns == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert loras == {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION}
    assert model.peft_config["default"].target_modules == ATTENTION | {"mlp"}


def test_fused_projections_are_found():
    """Phi-3: qkv_proj, o_proj and a gate_up_proj MLP."""
    model = attach(tiny_model("phi3"))
    assert model.peft_config["default"].target_modules == {"qkv_proj", "o_proj", "mlp"}


@pytest.mark.parametrize("kind", ["sequence classification", "bare"])
def test_other_heads(kind):
    """The layers are found below any head, or none."""
    config = AutoConfig.for_model("llama", **SMALL)
    factory = AutoModelForSequenceClassification if kind == "sequence classification" else AutoModel
    task_type = "SEQ_CLS" if kind == "sequence classification" else "FEATURE_EXTRACTION"
    ffns, loras = adapted(attach(factory.from_config(config), task_type=task_type))
    assert len(ffns) == 2
    assert len(loras) == 8


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "model_type, text, vision",
    [
        ("llava", {"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 8, **VISION}),
        ("gemma3", {"head_dim": 8}, {"image_size": 16, "patch_size": 8, **VISION}),
        (
            "qwen2_5_vl",
            {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
        ),
    ],
)
def test_the_vision_tower_is_left_alone(model_type, text, vision, tmp_path):
    """Pixtral's and Qwen's vision towers have gated MLPs and attention projections of the same names."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, text_config={**SMALL, **tokens, **text}, vision_config=vision)
    model = attach(AutoModelForImageTextToText.from_config(config), task_type=None)
    ffns, loras = adapted(model)
    assert ffns == {f"model.language_model.layers.{i}.mlp" for i in (0, 1)}
    assert loras == {f"model.language_model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION}

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_config(config), tmp_path)
    assert adapted(again) == (ffns, loras)
    some = attach(AutoModelForImageTextToText.from_config(config), task_type=None, layers_to_transform=[1])
    assert adapted(some)[0] == {"model.language_model.layers.1.mlp"}
    assert len(adapted(some)[1]) == 4


@pytest.mark.parametrize(
    "targets, ffns, loras",
    [
        (["q_proj", "mlp"], 2, 2),
        (["mlp"], 2, 0),
        (["model.layers.1.mlp", "layers.0.self_attn.v_proj"], 1, 1),
        (r".*layers\.0\.(mlp|self_attn\.[qk]_proj)", 1, 2),
        (["mlp", "lm_head"], 2, 1),
    ],
)
def test_target_modules_are_honoured_and_reloaded(targets, ffns, loras, tmp_path):
    """A list of suffixes or names, or a regex; the saved adapter finds the same modules."""
    model = attach(tiny_model(), target_modules=targets, init_lora_weights=False)
    found = adapted(model)
    assert (len(found[0]), len(found[1])) == (ffns, loras)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert adapted(again) == found
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "settings, ffns, loras",
    [
        ({"layers_to_transform": [1]}, {"model.layers.1.mlp"}, 4),
        ({"layers_to_transform": 0}, {"model.layers.0.mlp"}, 4),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"model.layers.0.mlp"}, 4),
        ({"exclude_modules": ["k_proj", "layers.0.mlp"]}, {"model.layers.1.mlp"}, 6),
        ({"exclude_modules": r".*layers\.1.*"}, {"model.layers.0.mlp"}, 4),
    ],
)
@pytest.mark.parametrize("targets", [None, ["q_proj", "k_proj", "v_proj", "o_proj", "mlp"]])
def test_layers_and_exclusions_hold_for_attention_and_mlp(settings, targets, ffns, loras, tmp_path):
    model = attach(tiny_model(), target_modules=targets, **settings)
    assert adapted(model)[0] == ffns
    assert len(adapted(model)[1]) == loras
    model.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(tiny_model(), tmp_path)) == adapted(model)


def test_rank_and_alpha_patterns_hold_for_attention_and_mlp(tmp_path):
    """The pattern's rank and scale, in the layer and after reloading."""
    patterns = {"rank_pattern": {"layers.1.mlp": 2, "q_proj": 3}, "alpha_pattern": {"layers.1.mlp": 1, "q_proj": 6}}
    model = attach(tiny_model(), init_lora_weights=False, **patterns)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    for loaded in (model, again):
        first, second = loaded.base_model.model.model.layers
        ranks = [layer.mlp.lora_graphmoe["default"].experts.gate_proj.A.shape[1] for layer in (first, second)]
        assert ranks == [4, 2]
        assert [layer.mlp.lora_graphmoe["default"].scale for layer in (first, second)] == [2, 0.5]
        assert first.self_attn.q_proj.scaling["default"] == 2
        assert first.self_attn.q_proj.lora_A["default"].weight.shape[0] == 3
        assert first.self_attn.k_proj.lora_A["default"].weight.shape[0] == 4
