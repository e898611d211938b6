"""The plugin within the real Axolotl: its loader, its schema, its command. Skipped where Axolotl does not import.

Tried with 0.19.0 on Transformers 5.17.0 and PEFT 0.21.2; the command also needs the version of TRL that Axolotl asks
for (1.9.0).
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import yaml
from peft import PeftModel

from tests.integrations.configurations import FOLDER, ROOT, checked, needs_axolotl, parsed
from tests.model.tiny_models import tiny_model

pytestmark = needs_axolotl


def test_axolotl_s_own_loader_attaches_the_adapter(manager):
    loader = pytest.importorskip("axolotl.loaders.adapter", reason="Axolotl's loader does not import here")
    model, config = loader.load_adapter(tiny_model(), parsed(), "graphmoe")
    assert isinstance(model, PeftModel)
    assert config.title == "GraphMoE(MixLoRA)"


def test_the_example_is_valid(manager):
    """Axolotl drops a key that it does not know, so the keys are compared with its schema too."""
    config = importlib.import_module("axolotl.integrations.config")
    text = yaml.safe_load((FOLDER / "graphmoe.yaml").read_text())
    _, inputs = config.merge_input_args()
    assert set(text) <= set(inputs.model_fields)
    manager.plugins["graphmoe_axolotl.GraphMoEPlugin"].register(text)
    dictionary = importlib.import_module("axolotl.utils.dict").DictDefault(text)
    found = importlib.import_module("axolotl.utils.config").validate_config(dictionary)
    assert found.graphmoe == text["graphmoe"]
    assert found.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_relora_is_refused_by_axolotl(manager):
    """It merges the adapter into the base and starts again; the capabilities say that this one has no merge."""
    with pytest.raises(ValueError, match="must support ReLoRA"):
        checked(manager, relora=True, jagged_restart_steps=2)


def test_every_key_of_axolotl_s_for_adapters_is_read_or_refused(package):
    """A newer Axolotl's keys would be dropped without a word."""
    settings = importlib.import_module("graphmoe_axolotl.settings")
    # Read by load_adapter; of the optimizer and the merge, which Axolotl sees to.
    read = {"adapter", "lora_model_dir", "peft_autocast_adapter_dtype"}
    others = {"loraplus_lr_ratio", "loraplus_lr_embedding", "merge_method"}
    keys = set(importlib.import_module("axolotl.utils.schemas.peft").LoraConfig.model_fields)
    inputs = importlib.import_module("axolotl.utils.schemas.config").AxolotlInputConfig.model_fields
    keys |= {key for key in inputs if key.startswith(("lora_", "peft_"))}
    assert set(settings.OPTIONS) & set(inputs) == set()  # which register() would refuse outside of the block
    assert keys - set(settings.LORA_KEYS) - set(settings.REFUSED) == read | others


@pytest.mark.slow
def test_axolotl_trains_from_a_yaml_file(tmp_path):
    """The command, on a tiny model: a file's keys, the data, Axolotl's trainer, the saved adapter."""
    pytest.importorskip("axolotl.core.builders", reason="Axolotl's trainers do not import here", exc_type=ImportError)
    from graphmoe_model.demo.base import make_tokenizer

    tokenizer = make_tokenizer(0)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    tiny_model(vocab_size=len(tokenizer), **ends).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say one.", "output": "one"}\n' * 16)
    text = yaml.safe_load((FOLDER / "graphmoe.yaml").read_text())
    for key in ("special_tokens", "evals_per_epoch", "saves_per_epoch", "num_epochs"):
        del text[key]
    text |= {"base_model": "base", "val_set_size": 0, "bf16": False, "fp16": False, "max_steps": 2, "output_dir": "out"}
    text |= {"datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "alpaca"}], "micro_batch_size": 2}
    text |= {"gradient_accumulation_steps": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(text))
    path = os.pathsep.join([str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "axolotl.cli.train", "run.yaml"]
    environment = os.environ | {"PYTHONPATH": path, "WANDB_MODE": "disabled"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "aux_loss" in run.stdout + run.stderr
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert PeftModel.from_pretrained(base, tmp_path / "out").peft_config["default"].title == "GraphMoE(MixLoRA)"
