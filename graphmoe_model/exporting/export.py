"""Writes the base and the active adapter of a PEFT model as `graphmoe_inference.load_for_inference` reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoRALinear
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerBase

from graphmoe_inference.folder import BASE, CONFIG, WEIGHTS, ExportedModel, LinearExport, MLPExport, digest
from graphmoe_model.checkpoints import temporary_folder
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.exporting.base import check_generation_settings, place, write_base, write_settings
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.layers.linear import RoutedLoRALinear
from graphmoe_model.machine import installed_version
from graphmoe_model.module_names import plain_name
from graphmoe_model.storage.dequantise import is_linear, is_quantised

EXPORTED_WRAPPERS = (ModulesToSaveWrapper, TrainableTokensWrapper)
PACKAGES = ("graphmoe", "torch", "transformers", "peft")


def export_for_inference(
    model: PeftModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> ExportedModel:
    """Write a PEFT model's base and active adapter into one folder, whole or not at all.

    ``graphmoe_inference.load_for_inference(folder)`` then loads it without PEFT, and gives the same logits. Layers
    without the adapter stay as they are; modules and tokens that it trained whole (``modules_to_save``,
    ``trainable_token_indices``) take the place of the base's. The model stays as it was.

    Args:
        model: with one active GraphMoE adapter, its weights in place.
        folder: new, or empty.
        tokenizer: saved with the base.

    Returns:
        What the folder's description says.

    Raises:
        TypeError: it is no PEFT model with a GraphMoE adapter.
        ValueError: the folder holds something or is the current one, the base is no causal language model or quantised,
            its generation settings contradict each other, or the adapter counts at another scale than it was trained
            with or is on modules that are neither MLPs nor plain linears; weights are offloaded or split over
            processes; the folder cannot be written.
    """
    config = _config(model)
    base: Any = model.get_base_model()
    _check_model(model, base)
    given, folder = folder, Path(folder).resolve()
    _check_folder(folder, given)
    name = model.active_adapter
    mlps, linears, tensors = _adapter(base, str(name), config)
    try:
        with temporary_folder(folder.parent) as work:
            new = work / folder.name
            (new / BASE).mkdir(parents=True)
            written = write_base(base, str(name), new / BASE, tokenizer)
            write_settings(base, new, tokenizer)
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, new / WEIGHTS)
            exported = _described(config, mlps, linears, digest(new / WEIGHTS))
            text = json.dumps(exported.as_config(written.to_dict()), indent=2, default=str) + "\n"
            (new / CONFIG).write_text(text, encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            os.replace(new, folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{given} cannot be written: {reason}; free space there, or name another folder") from error
    return exported


def _config(model: Any) -> GraphMoEConfig:
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a PeftModel with a GraphMoE adapter, got {type(model).__name__}")
    config = model.peft_config[str(model.active_adapter)]
    if not isinstance(config, GraphMoEConfig):
        raise TypeError(f"the active adapter {model.active_adapter!r} is of {type(config).__name__}, not of GraphMoE")
    return config


def _check_folder(folder: Path, given: str | Path) -> None:
    if folder == Path.cwd():
        raise ValueError(
            f"{str(given)!r} is the current folder, which an export cannot take the place of; name a new one"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{given} is there already; name a new folder")


def _check_model(model: nn.Module, base: Any) -> None:
    loaded: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base.config), ())
    if type(base) not in (loaded if isinstance(loaded, tuple) else (loaded,)):
        raise ValueError(
            f"the base is a {type(base).__name__}, and an export is of a causal language model, as "
            "AutoModelForCausalLM loads it; load this adapter by PEFT"
        )
    check_generation_settings(base)
    for name, module in model.named_modules():
        plain = plain_name(name)
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, EXPORTED_WRAPPERS):
            raise ValueError(
                f"{plain} is a {type(module).__name__}, which an export does not hold; load this adapter by PEFT"
            )
        if not isinstance(module, BaseTunerLayer) and is_linear(module) and is_quantised(module):
            raise ValueError(
                f"{plain} is quantised: an export holds dense weights; load the base without quantisation and attach "
                "the adapter to it"
            )
    for name, parameter in model.named_parameters():
        # Of ZeRO-3 and of FSDP a parameter is a part, of offloading it is nowhere.
        if parameter.is_meta or isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{plain_name(name)} holds no whole weight here (offloading, FSDP, ZeRO-3); save the adapter, and "
                "export it in one process with the model loaded whole"
            )


def _adapter(
    base: nn.Module, name: str, config: GraphMoEConfig
) -> tuple[dict[str, MLPExport], dict[str, LinearExport], dict[str, Tensor]]:
    """The modules that the adapter is on, and its tensors by module and name."""
    mlps: dict[str, MLPExport] = {}
    linears: dict[str, LinearExport] = {}
    tensors: dict[str, Tensor] = {}
    for module_name, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer) or not _has_adapter(module, name):
            continue
        path = place(module_name)
        _check_kind(module, path)
        scale = _trained_scale(module, path, name)
        own: Any = module
        if isinstance(module, FusedGraphMoEFFN):
            layout, adapter = own._base().layout, own.adapter(name)
            linear_names = (layout.gate, layout.up, layout.down)
            mlps[path] = MLPExport(*linear_names, own.traits.activation, adapter.num_experts, scale)
            found = dict(adapter.named_parameters())
        elif isinstance(module, RoutedLoRALinear):
            linears[path] = LinearExport(scale, own.adapter(name).num_experts)
            found = dict(own.adapter(name).named_parameters())
        else:
            linears[path] = LinearExport(scale)
            found = _lora_tensors(module, path, name, config)
        tensors |= {f"{path}.{key}": tensor for key, tensor in found.items()}
    return mlps, linears, tensors


def _has_adapter(module: BaseTunerLayer, name: str) -> bool:
    if isinstance(module, TrainableTokensLayer):
        return False  # inside of a wrapper, with which the base's weights are written
    return any(name in getattr(module, own, {}) for own in module.adapter_layer_names)


def _check_kind(module: Any, path: str) -> None:
    plain = isinstance(module, LoRALinear) and not module.fan_in_fan_out
    if not plain and not isinstance(module, FusedGraphMoEFFN | RoutedLoRALinear):
        kind = type(module.get_base_layer()).__name__
        raise ValueError(
            f"the adapter is on {path}, of the kind {kind}, and an export holds adapters on MLPs and plain linears; "
            "load this one by PEFT"
        )


def _trained_scale(module: Any, path: str, name: str) -> float:
    """s of a layer, as it was trained."""
    if isinstance(module, LoRALinear):
        rank, alpha = module.r[name], module.lora_alpha[name]
        trained = alpha / (rank**0.5 if module.use_rslora[name] else rank)
    else:
        trained = module.adapter(name).scale
    if module.scaling[name] != trained:
        raise ValueError(
            f"{path} counts {module.scaling[name] / trained:g} times what it was trained with, and an export holds "
            "adapters as they were trained: set the scale back to 1"
        )
    return float(trained)


def _lora_tensors(module: Any, path: str, name: str, config: GraphMoEConfig) -> dict[str, Tensor]:
    """A and B of plain LoRA, and DoRA's scale of the rows, as PEFT computes it."""
    lora_A, lora_B = module.lora_A[name], module.lora_B[name]
    A: Any = lora_A.weight
    B: Any = lora_B.weight
    if lora_B.bias is not None:
        raise ValueError(f"{path} has a bias in its LoRA (lora_bias), which an export does not hold")
    found: dict[str, Tensor] = {"A": A, "B": B}
    if config.use_dora:
        vector: Any = module.lora_magnitude_vector[name]
        weight: Any = module.get_base_layer().weight
        with torch.no_grad():
            added = vector.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=name)
            norm = vector.get_weight_norm(weight.to(A.dtype), added.to(A.dtype), module.scaling[name])
            found["dora_scale"] = (vector.weight / norm).view(1, -1)
    return found


def _described(
    config: GraphMoEConfig, mlps: dict[str, MLPExport], linears: dict[str, LinearExport], weights: str
) -> ExportedModel:
    method = config.base_method
    return ExportedModel(
        title=config.title,
        routers=method.routers,
        dense=method.dense,
        use_dora=bool(config.use_dora),
        rounds=config.rounds,
        top_k=config.top_k,
        norm_topk_prob=config.norm_topk_prob,
        candidate_input=config.candidate_input,
        candidate_activation=config.candidate_activation,
        fold=config.fold,
        backend=config.backend,
        mlps=mlps,
        linears=linears,
        weights=weights,
        made_by={package: found for package in PACKAGES if (found := installed_version(package)) is not None},
    )
