"""Loads an exported model: the base by Transformers, then the adapter's layers in the place of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graphmoe_inference.folder import BASE, WEIGHTS, ExportedModel, read_export
from graphmoe_inference.layers import Frozen, LoRALinear, RethinkingMLP, RoutedLinear
from graphmoe_kernels import get_activation


def load_for_inference(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load a model that `graphmoe_model.exporting.export_for_inference` wrote, ready to generate.

    It is the base's own class, frozen and in evaluation mode, with the adapter's layers in it; folds are computed here
    and not in the first forward. The tokenizer is in the folder's ``base``:
    ``AutoTokenizer.from_pretrained(f"{folder}/base")``.

    Args:
        folder: of the export.
        dtype: of the base's weights; None: as they were exported. The adapter keeps its own.
        device: where it goes.

    Raises:
        TypeError: ``dtype`` is no dtype of PyTorch.
        ValueError: as `read_export`; there is no such device; the base lacks weights or a module that the adapter is
            on, or has others; a file is not whole, or lacks a tensor; an activation is not registered here.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, or None, got {dtype!r}")
    folder = Path(folder)
    exported = read_export(folder)
    model = _load_base(folder / BASE, "auto" if dtype is None else dtype)
    # Copies: a file's tensors lie where the file has them, and products at odd addresses round otherwise.
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    put_into(model, exported, tensors, str(folder))
    try:
        model = model.to(device).eval().requires_grad_(False)
    except (
        AssertionError,
        RuntimeError,
    ) as error:  # of PyTorch, where it was built without the device or there is none
        raise ValueError(
            f"the model cannot be moved to device={str(device)!r}: {error}; name another device"
        ) from error
    model.save_pretrained = partial(_no_saving, str(folder))
    prepare(model)
    return model


def _load_base(folder: Path, dtype: Any) -> Any:
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named here
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # the last where a file is cut off
        raise ValueError(f"{folder} holds no whole model: {error}; export the model again") from error
    model, found = loaded
    wrong = {
        "lacks weights": sorted(found["missing_keys"]),
        "has weights that its class does not take": sorted(found["unexpected_keys"]),
        "has weights of other sizes": sorted(name for name, *_ in found["mismatched_keys"]),
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(f"{folder} {what}: {names[:4]}; export the model again")
    return model


def _no_saving(folder: str, *_: Any, **__: Any) -> None:
    """In place of Transformers' method, which would write layers that no class of its own reads back."""
    raise ValueError(f"a model of load_for_inference is saved already: copy the folder {folder}")


def put_into(model: nn.Module, exported: ExportedModel, tensors: dict[str, Tensor], source: str) -> None:
    """Put an adapter's layers in the place of a model's own modules.

    Args:
        model: the base.
        exported: the adapter's settings and modules.
        tensors: of the adapter, by module and name.
        source: what errors name.

    Raises:
        ValueError: the model has no such module, tensors are missing or too many, or an activation is not registered in
            this process.
    """
    for mlp in exported.mlps.values():
        get_activation(mlp.activation)
    by_module: dict[str, dict[str, Tensor]] = {name: {} for name in (*exported.mlps, *exported.linears)}
    for key, tensor in tensors.items():
        module = next((name for name in by_module if key.startswith(f"{name}.")), None)
        if module is None:
            raise ValueError(f"{source} has the tensor {key}, which is of no module of its configuration")
        by_module[module][key.removeprefix(f"{module}.")] = tensor
    for name, mlp in exported.mlps.items():
        _replace(model, name, source, partial(RethinkingMLP, exported=exported, own=mlp, tensors=by_module[name]))
    for name, linear in exported.linears.items():
        kind: Any = LoRALinear if linear.num_experts is None else RoutedLinear
        _replace(model, name, source, partial(kind, exported=exported, own=linear, tensors=by_module[name]))


def prepare(model: nn.Module) -> None:
    """Compute what an adapter's layers keep between forwards (folds, joined experts), before the first."""
    for module in model.modules():
        if isinstance(module, Frozen):
            module.prepare()


def _replace(model: nn.Module, name: str, source: str, make: Callable[[Any], nn.Module]) -> None:
    parent, _, last = name.rpartition(".")
    try:
        base = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, make(base))
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{source} does not fit its base: {name}: {error}; export the model again") from error
