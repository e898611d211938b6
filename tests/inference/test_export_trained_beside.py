"""Exports of adapters that trained whole modules or tokens beside their layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from graphmoe_inference import load_for_inference
from graphmoe_model.exporting import export_for_inference
from tests.inference.test_export import IDS, logits, routed
from tests.model.method_models import adapted
from tests.model.tiny_models import tiny_model

BESIDE: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "both, and a norm": {"modules_to_save": ["lm_head", "embed_tokens", "model.norm"]},
    "both, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 5, int(IDS[0, 0])]},
}


def with_all_trained(model: PeftModel) -> PeftModel:
    """Move what is trained beside the experts away from the base's values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


CASES = [(name, tied) for name in BESIDE for tied in (False, True) if tied or name != "both, tied"]


@pytest.mark.parametrize("name, tied", CASES)
def test_what_is_trained_beside_the_adapter_takes_the_base_s_place(name, tied, tmp_path):
    """Whole modules and single tokens; what the configuration ties is untied where training has parted it."""
    model = with_all_trained(routed(base=tiny_model(tie_word_embeddings=tied), **BESIDE[name]))
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    export_for_inference(model, tmp_path / "out")
    loaded = load_for_inference(tmp_path / "out")
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(model), expected)
    assert not any("original" in name or "token_adapter" in name for name, _ in loaded.named_parameters())


def test_modules_of_an_adapter_that_is_not_active_are_left_out(tmp_path):
    """The base's own lm_head is written, as the active adapter has it."""
    model = routed(modules_to_save=["lm_head"])
    model.add_adapter("other", adapted("graphmoe-mixlora", tiny_model()).peft_config["default"])
    model.set_adapter("other")
    with_all_trained(model)
    export_for_inference(model, tmp_path / "out")
    assert torch.equal(logits(load_for_inference(tmp_path / "out")), logits(model))


def test_trained_tokens_of_a_bf16_base_are_rounded_as_peft_rounds_them(tmp_path):
    """Their values are fp32 in the adapter, and bf16 in the embedding that they are put into."""
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = with_all_trained(routed(base=base, trainable_token_indices=[1, 5]))
    export_for_inference(model, tmp_path / "out")
    loaded = load_for_inference(tmp_path / "out")
    ids = torch.tensor([[1, 5, 7]])
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, ids), logits(model, ids))
