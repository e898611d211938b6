"""An adapter that is refused after it was attached, as its weights do not fit, leaves the model as it was.

The adapter that is there already is on one layer alone, so that a further one wraps modules that no other adapter has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.routing.router_loss_hooks import find_hooks
from tests.model.adapter_folders import WEIGHTS
from tests.model.attaching import snapshot
from tests.model.tiny_models import logits, tiny_config, tiny_model, tiny_peft_model


def bare() -> nn.Module:
    return tiny_model()


def injected() -> nn.Module:
    model = tiny_model()
    model.add_adapter(tiny_config(init_lora_weights=False, layers_to_transform=[0]), "first")
    return model


def adapted() -> PeftModel:
    return tiny_peft_model(init_lora_weights=False, layers_to_transform=[0])


def load_by_transformers(model: Any, folder: Path) -> object:
    return model.load_adapter(str(folder), "second")


def load_by_peft(model: Any, folder: Path) -> object:
    return model.load_adapter(folder, "second")


def load_anew(model: nn.Module, folder: Path) -> object:
    return PeftModel.from_pretrained(model, folder)


@pytest.fixture(scope="module")
def misfits(tmp_path_factory) -> dict[str, Path]:
    """Adapters of which one tensor is missing, and of which one has another shape."""
    folders = {}
    for fault in ("missing", "shape"):
        folder = folders[fault] = tmp_path_factory.mktemp(fault)
        tiny_peft_model(init_lora_weights=False).save_pretrained(folder)
        tensors = load_file(folder / WEIGHTS)
        name = next(name for name in tensors if name.endswith("layers.1.mlp.lora_graphmoe.router.weight"))
        tensors[name] = tensors[name][:, 1:].contiguous()
        if fault == "missing":
            del tensors[name]
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folders


@pytest.mark.parametrize("fault", ["missing", "shape"])
@pytest.mark.parametrize(
    ("make", "load"),
    [
        (bare, load_by_transformers),
        (injected, load_by_transformers),
        (adapted, load_by_peft),
        (bare, load_anew),
    ],
    ids=["Transformers, first", "Transformers, further", "PEFT, further", "PEFT, first"],
)
def test_the_model_is_as_it_was(
    make: Callable[[], nn.Module], load: Callable[..., object], fault: str, misfits: dict[str, Path]
):
    """No wrapper, hook, flag or configuration of the refused adapter stays behind."""
    model = make()
    expected, before, hooks = logits(model), snapshot(model), find_hooks(model)
    layers = None if hooks is None else list(hooks.layers)
    with pytest.raises((ValueError, RuntimeError), match=r"lora_graphmoe\.router|ignore_mismatched_sizes"):
        load(model, misfits[fault])
    assert snapshot(model) == before
    assert find_hooks(model) is hooks
    assert hooks is None or hooks.layers == layers
    assert torch.equal(logits(model), expected)


def test_a_right_one_can_be_loaded_afterwards(misfits: dict[str, Path], tmp_path: Path):
    """What is put back is whole enough to go on with."""
    tiny_peft_model(init_lora_weights=False).save_pretrained(tmp_path)
    model = tiny_model()
    with pytest.raises(ValueError, match="missing from the checkpoint"):
        load_by_transformers(model, misfits["missing"])
    model.load_adapter(str(tmp_path), "second")
    assert sum(isinstance(module, FusedGraphMoEFFN) for module in model.modules()) == 2
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_model(), tmp_path)))
