"""Loads a model as the default loader does: weights streamed into it by name, checked, and its linears finished."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open


def get_model(vllm_config: Any) -> Any:
    model_config = vllm_config.model_config
    before = torch.get_default_dtype()
    torch.set_default_dtype(model_config.dtype)
    try:
        model = model_config.model_class(vllm_config=vllm_config, prefix="")
    finally:
        torch.set_default_dtype(before)
    patterns = getattr(model, "allow_patterns_overrides", None) or ["*.safetensors"]
    loaded = model.load_weights(weights_of(model_config.model, patterns))
    missing = {name for name, _ in model.named_parameters()} - loaded
    if missing:
        raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")
    for module in model.modules():
        if hasattr(module, "process_weights_after_loading"):
            module.process_weights_after_loading()
    return model.eval()


def weights_of(folder: str, patterns: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the files of the first pattern that has any, in the order of their names."""
    files: list[str] = []
    for pattern in patterns:
        files += sorted(glob.glob(os.path.join(folder, pattern)))
        if files:
            break
    if not files:
        raise RuntimeError(f"Cannot find any model weights with `{folder}`")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)
