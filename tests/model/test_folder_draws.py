"""Drawn adapter folders: refused by a message that tells what is wrong, or loaded and converted as they are."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from rich.console import Console
from torch import Tensor, nn

from graphmoe_cli.runs.convert import run
from graphmoe_model.conversion import read_adapter
from tests.drawing import assert_clear, make_draws
from tests.model.folder_draws import Saved, our_folders, their_folders
from tests.model.tiny_models import logits, tiny_model

pytestmark = pytest.mark.methods

# What a message about a folder names: a file, a tensor, a field, or what the adapter is to the model.
NAMES = ("adapter_config.json", "adapter_model", "adapter", "base_model.", "lora_", "must be", "module", "task type")
THEIRS = ("peft", "transformers", "huggingface_hub")


def load(folder: Path) -> PeftModel | None:
    """The adapter on a fresh model; None if it was refused, clearly, or is no business of this package's."""
    if settings_of(folder).get("peft_type") != "GRAPHMOE":
        return None  # PEFT reads the file before it knows whose adapter it is
    try:
        return PeftModel.from_pretrained(tiny_model(), folder)
    except Exception as error:
        names = [*NAMES, *settings_of(folder)]
        assert_clear(error, names, also_from=THEIRS)
        return None


def settings_of(folder: Path) -> dict[str, Any]:
    """The configuration; {} for what is none."""
    try:
        found = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def converted(source: Path, target: Path, **options: Any) -> bool:
    """Whether it was converted; if not, it was refused clearly and nothing was written."""
    try:
        run(source, target, console=Console(file=io.StringIO()), **options)
    except Exception as error:
        assert_clear(error, [*NAMES, str(source), *settings_of(source)], also_from=THEIRS)
        assert not target.exists()
        return False
    return True


def numbers(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def check_ours(saved: Saved) -> None:
    """What loads has the file's values; what is converted loads too, and computes the same."""
    with tempfile.TemporaryDirectory() as place:
        folder, target = Path(place) / "saved", Path(place) / "out"
        saved.write(folder)
        direct = load(folder)
        if direct is not None:
            state = get_peft_model_state_dict(direct)
            for name, tensor in saved.tensors.items():
                if name in state and not saved.files:
                    assert torch.equal(state[name], tensor.to(state[name].dtype)) or not numbers(direct), name
        if not converted(folder, target):
            return
        copy = load(target)
        if direct is not None:
            assert copy is not None, "loads, but not once converted"
            assert torch.equal(logits(copy), logits(direct))
        assert all(bool(t.isfinite().all()) for t in read_adapter(target).tensors.values())


def check_theirs(saved: Saved) -> None:
    """What is converted keeps every value, and loads."""
    with tempfile.TemporaryDirectory() as place:
        folder, target = Path(place) / "saved", Path(place) / "out"
        saved.write(folder)
        if not converted(folder, target):
            return
        adapter = read_adapter(target)
        kept = sum(t.double().abs().sum().item() for t in adapter.tensors.values())
        given = sum(t.double().abs().sum().item() for t in saved.tensors.values() if isinstance(t, Tensor))
        assert kept == pytest.approx(given, rel=1e-6)
        model = load(target)
        if model is None:
            # Names of modules and the size of one layer's projection may be another model's.
            other = any(change in " ".join(saved.history) for change in ("' is '", "a row less"))
            assert other, "converted, but does not load"
            return
        assert logits(model).isfinite().all()


CHECKS = {"ours": (check_ours, our_folders), "theirs": (check_theirs, their_folders)}


@pytest.mark.parametrize("source", CHECKS)
def test_drawn_folders(source):
    check, strategy = CHECKS[source]
    make_draws(check, strategy(), examples=15, seed=31)


@pytest.mark.slow
@pytest.mark.parametrize("source", CHECKS)
def test_many_drawn_folders(source):
    check, strategy = CHECKS[source]
    make_draws(check, strategy(), examples=200, seed=1)
