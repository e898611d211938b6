"""``graphmoe export`` from its arguments to a folder that generates, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from graphmoe_inference import load_for_inference
from tests.cli.command import graphmoe
from tests.model.questions_made import byte_level, small_llama
from tests.model.tiny_models import tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A base model with its tokenizer, and adapters of it."""
    root = tmp_path_factory.mktemp("saved")
    tokenizer = byte_level()
    small_llama(tokenizer).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, config in {
        "graphmoe": tiny_config(init_lora_weights=False),
        "lora": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }.items():
        model = get_peft_model(small_llama(tokenizer), config)
        model.peft_config["default"].base_model_name_or_path = str(root / "base")
        model.save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_exported_model_answers_as_the_adapter_does(saved, tmp_path, dtype):
    given = ("--model", saved["base"], "--adapter", saved["graphmoe"], "--dtype", dtype)
    result = graphmoe("export", *given, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "GraphMoE(MixLoRA) on 1 MLPs and 4 linears" in result.stdout
    loaded = load_for_inference(tmp_path / "out")
    wanted = torch.float32 if dtype == "auto" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(saved["base"], dtype=wanted)
    model = PeftModel.from_pretrained(base, saved["graphmoe"]).eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out" / "base")("the river grows", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_what_cannot_be_exported_ends_in_one_line_and_status_2(saved, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for changes, message in (
        ({"--adapter": saved["lora"]}, "is LoRA of PEFT's own, which merges into its base"),
        ({"--adapter": saved["base"]}, "cannot load the adapter"),
        ({"--model": "./nowhere"}, "was trained on the base model"),
        ({"--output": tmp_path / "full"}, "is there already; name a new folder"),
    ):
        given = {"--model": saved["base"], "--adapter": saved["graphmoe"], "--output": tmp_path / "out", **changes}
        result = graphmoe("export", *(word for pair in given.items() for word in pair))
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.startswith("graphmoe export: error: ")
        assert not (tmp_path / "out").exists()
