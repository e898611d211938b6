"""vLLM, real or its stand-in, and exported models in it."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "integrations" / "vllm"
STAND_IN = Path(__file__).parent / "vllm_stand_in"
GROUP = "vllm.general_plugins"


def entry_points() -> list[importlib.metadata.EntryPoint]:
    """What pip would read from the package's own description."""
    found = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    return [importlib.metadata.EntryPoint(name, value, GROUP) for name, value in found.items()]


@contextmanager
def stand_in(monkeypatch: Any) -> Iterator[None]:
    """The stand-in as ``vllm``, with the plugin found as an installed one is; neither is left behind."""
    ours = ("vllm", "graphmoe_vllm")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ours}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.syspath_prepend(str(FOLDER))
    with monkeypatch.context() as installed:
        installed.setattr(importlib.metadata, "entry_points", lambda group: entry_points() if group == GROUP else [])
        importlib.import_module("vllm.plugins").load_general_plugins()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.modules.update(before)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content.pop("graphmoe", None)  # other tests hold that Transformers refuses such a folder


def engine(folder: Path, **changes: Any) -> Any:
    """The stand-in's settings of an engine over a folder, as the stand-in's frontend makes them."""
    config = importlib.import_module("vllm.config")
    model = config.ModelConfig(str(folder), quantization=changes.pop("quantization", None))
    parallel = config.ParallelConfig(**changes.pop("parallel", {}))
    load = config.LoadConfig(**changes.pop("load", {}))
    return config.VllmConfig(model, parallel, load, **changes)


def loaded(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """A folder's model in the stand-in, and its engine's settings."""
    settings = engine(folder, **changes)
    return importlib.import_module("vllm.model_executor.model_loader").get_model(settings), settings


@torch.inference_mode()
def logits(model: Any, settings: Any, ids: Tensor) -> Tensor:
    """Logits [sequences, length, V] of ids [sequences, length], which run laid end to end."""
    context = importlib.import_module("vllm.forward_context")
    lengths = [ids.shape[1]] * ids.shape[0]
    positions = torch.arange(ids.shape[1]).repeat(ids.shape[0])
    with context.set_forward_context(lengths, settings):
        hidden = model(ids.flatten(), positions)
    return model.compute_logits(hidden).view(*ids.shape, -1)
