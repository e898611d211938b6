"""Two trained adapters that no shape tells apart, and what a folder that holds one of them, or a mixture, gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel

from tests.model.tiny_models import logits, tiny_model, tiny_peft_model

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG = "adapter_config.json"


def two_models() -> dict[str, PeftModel]:
    """Adapters 'one' and 'two' of the same sizes, with other weights and another top_k."""
    models = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        models[name] = tiny_peft_model(init_lora_weights=False, rounds=2, top_k=seed + 1)
        models[name].eval()
    return models


def loaded(folder: Path) -> torch.Tensor:
    """The logits of the tiny model with the folder's adapter."""
    return logits(PeftModel.from_pretrained(tiny_model(), folder))


def mixture(folder: Path, models: dict[str, PeftModel], **save: object) -> Path:
    """The configuration of 'one' beside the weights of 'two'."""
    for name, model in models.items():
        model.save_pretrained(folder / name, **save)
    (folder / "mixture").mkdir()
    shutil.copy2(folder / "one" / CONFIG, folder / "mixture" / CONFIG)
    for path in (folder / "two").glob("adapter_model.*"):
        shutil.copy2(path, folder / "mixture")
    return folder / "mixture"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
