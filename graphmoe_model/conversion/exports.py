"""GraphMoE adapters of one round as MoE-PEFT saves them, and LoRA as PEFT saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, WEIGHTS_NAME
from torch import Tensor

from graphmoe_model.config import GraphMoEConfig, rank_and_alpha
from graphmoe_model.conversion.adapter import Adapter, is_other, pattern_of, save_safetensors
from graphmoe_model.conversion.files import write_folder
from graphmoe_model.conversion.layout import LINEARS
from graphmoe_model.conversion.modules import Module
from graphmoe_model.conversion.peer_config import aux_loss_coef_there
from graphmoe_model.conversion.refusals import moe_peft_reasons, peft_lora_reasons, raise_for
from graphmoe_model.module_names import ROOT


def to_moe_peft(adapter: Adapter, folder: str | Path, overwrite: bool = False) -> list[str]:
    """Save an adapter of one round as MoE-PEFT does: adapter_config.json, and adapter_model.bin in float32.

    The method ``lora`` becomes PEFT's LoRA (or DoRA), which PEFT loads as well. A linear of the MLPs whose A, B and
    router are zeros in every layer is left out: it is not adapted.

    Returns:
        Notes on what the file cannot say.

    Raises:
        ValueError: the format cannot hold the adapter; every reason is named.
        FileExistsError: the folder is a file, or is not empty and ``overwrite`` is off.
    """
    config = adapter.config
    if config.method == "lora":
        raise_for(peft_lora_reasons(adapter), "PEFT's LoRA format")
        settings, tensors = _whole_lora(adapter)
        write_folder(folder, lambda place: _save_bin(_file_of(settings, place), tensors, place), overwrite)
        return []
    raise_for(moe_peft_reasons(adapter), "MoE-PEFT's format")
    linears = _adapted_linears(adapter)
    projections = sorted({m.place.rpartition(".")[2] for m in adapter.modules if not m.is_mlp})
    tensors = {}
    for module in adapter.modules:
        there = f"{config.method}.layers.{module.layer}.{module.place}"
        tensors |= _apart(adapter, module, there, linears)
    moe_settings, notes = _moe_settings(adapter, [*projections, *linears])
    write_folder(folder, lambda place: _save_bin(moe_settings, tensors, place), overwrite)
    return notes


def to_peft(adapter: Adapter, folder: str | Path, overwrite: bool = False) -> list[str]:
    """Save an adapter of the method ``lora`` and one round as PEFT's own LoRA or DoRA, in safetensors.

    PEFT loads it without this package, and `peft.PeftModel.merge_and_unload` merges it into the base. A linear of the
    MLPs whose A and B are zeros in every layer is left out: it is not adapted.

    Returns:
        No notes: the format holds all of the adapter.

    Raises:
        ValueError: there is no LoRA that computes what the adapter computes; every reason is named.
        FileExistsError: the folder is a file, or is not empty and ``overwrite`` is off.
    """
    raise_for(peft_lora_reasons(adapter), "PEFT's LoRA format")
    settings, tensors = _whole_lora(adapter)
    write_folder(folder, lambda place: save_safetensors(settings, tensors, place), overwrite)
    return []


def attention_lora(adapter: Adapter, folder: str | Path, overwrite: bool = False) -> list[str]:
    """Save the attention's LoRA of a ``lora`` or ``mixlora`` adapter as PEFT's LoRA, which needs no GraphMoE.

    Returns:
        A note on what the model computes without the rest.

    Raises:
        ValueError: the adapter has no LoRA on the attention.
        FileExistsError: the folder is a file, or is not empty and ``overwrite`` is off.
    """
    method = adapter.config.base_method
    modules = [module for module in adapter.modules if not module.is_mlp]
    if method.attention != "lora" or not modules:
        why = {
            None: "the method has nothing on the attention",
            "experts": "its attention projections have routed experts, which no LoRA of PEFT can hold",
            "lora": "it adapts the MLPs alone",
        }[method.attention]
        raise ValueError(f"this {adapter.config.title} adapter has no LoRA on the attention to save: {why}")
    settings, tensors = _lora(adapter, modules)
    write_folder(folder, lambda place: save_safetensors(settings, tensors, place), overwrite)
    return ["only the attention's LoRA was written: without its part on the MLPs the model computes something else"]


def _whole_lora(adapter: Adapter) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A ``lora`` adapter as PEFT holds it, with what was trained beside it."""
    settings, tensors = _lora(adapter, adapter.modules)
    return settings, tensors | {name: own for name, own in adapter.tensors.items() if is_other(adapter.config, name)}


def _lora(adapter: Adapter, modules: list[Module]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Make the configuration and the tensors of these modules' LoRA as PEFT has them."""
    config = adapter.config
    linears = _adapted_linears(adapter)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module in modules:
        tensors |= _apart(adapter, module, f"{ROOT}{module.path}", linears)
        for path in [f"{module.path}.{linear}" for linear in linears] if module.is_mlp else [module.path]:
            ranks[path], alphas[path] = rank_and_alpha(config, module.path)
    # Names' ends select modules in other places too; they serve where the adapter has the layers of a decoder alone.
    given = config.target_modules
    by_name = isinstance(given, list | set) and all("." not in target for target in given)
    by_name = by_name and {module.stem for module in modules} == {"model.layers"}
    by_name = by_name and not config.exclude_modules and config.layers_to_transform is None
    settings = LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=sorted({path.rpartition(".")[2] for path in ranks} if by_name else ranks),
        rank_pattern=pattern_of(ranks, config.r),
        alpha_pattern=pattern_of(alphas, config.lora_alpha),
        modules_to_save=config.modules_to_save if len(modules) == len(adapter.modules) else None,
        trainable_token_indices=config.trainable_token_indices if len(modules) == len(adapter.modules) else None,
        ensure_weight_tying=config.ensure_weight_tying and len(modules) == len(adapter.modules),
    )
    return settings, tensors


def _adapted_linears(adapter: Adapter) -> list[str]:
    """List the linears of the MLPs that are adapted in some layer; all if none is (a fresh A is never zero)."""
    found = []
    for linear in LINEARS:
        of_linear = [
            adapter.tensors[name]
            for module in adapter.modules
            if module.is_mlp
            for name, entry in module.entries(adapter.config)
            if entry.linear == linear
        ]
        if any(bool(tensor.any()) for tensor in of_linear):
            found.append(linear)
    return found or list(LINEARS)


def _apart(adapter: Adapter, module: Module, there: str, linears: list[str]) -> dict[str, Tensor]:
    """Take a module's tensors apart: by their names there, every expert's by itself."""
    tensors: dict[str, Tensor] = {}
    for name, entry in module.entries(adapter.config):
        tensor = adapter.tensors[name]
        if entry.linear not in ("", *linears):
            continue
        parts = tensor.unbind() if entry.stacked else (tensor,)
        names = entry.peers(len(parts))
        tensors |= {f"{there}.{peer}": part for peer, part in zip(names, parts, strict=True)}
    return tensors


def _moe_settings(adapter: Adapter, targets: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Make the adapter_config.json of a mixture, and notes on what it cannot say."""
    config, notes = adapter.config, []
    mlp = rank_and_alpha(config, next(module.path for module in adapter.modules if module.is_mlp))
    others = {rank_and_alpha(config, module.path) for module in adapter.modules if not module.is_mlp}
    r, alpha = next(iter(others), mlp)  # they agree: refused before otherwise
    settings: dict[str, Any] = {
        "bias": "none",
        "peft_type": config.method.upper(),
        "task_type": config.task_type or "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": r,
        "lora_alpha": int(alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "routing_strategy": config.method,
        "num_experts": _num_experts(config),
    }
    if config.use_rslora:
        settings["use_rslora"] = True
    if mlp != (r, alpha):
        settings["expert_lora"] = {"r": mlp[0], "lora_alpha": int(mlp[1])}
        notes.append("the experts have a rank or alpha of their own: MoE-PEFT reads it, the mixlora package does not")
    if not config.base_method.dense:
        settings["top_k"] = config.top_k
        settings["router_loss"] = config.router_aux_loss_coef > 0
        settings["router_aux_loss_coef"] = aux_loss_coef_there(config.router_aux_loss_coef, config.top_k)
        if config.router_aux_loss == "paper" and config.router_aux_loss_coef > 0:
            notes.append("in further training the load-balance loss there is of the full softmax, not of Eq. 8")
        if config.router_aux_loss_scope == "global":
            notes.append("in further training the load-balance loss there is each process's own")
    if config.method == "mixlora":
        notes.append("no act_fn was written: MoE-PEFT takes the model's own, the mixlora package wants it in the file")
    if config.base_model_name_or_path is None:
        notes.append(
            "the base model's name is not known: the mixlora package wants base_model_name_or_path in the file"
        )
    return settings, notes


def _num_experts(config: GraphMoEConfig) -> int:
    assert isinstance(config.num_experts, int)  # refused before otherwise
    return config.num_experts


def _file_of(config: LoraConfig, folder: Path) -> dict[str, Any]:
    """Return the adapter_config.json that PEFT writes."""
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))


def _save_bin(settings: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Write both files of MoE-PEFT's format, with copies of the tensors: torch.save keeps all storage behind a view."""
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    whole = {name: t.to(torch.float32, copy=True).contiguous() for name, t in tensors.items()}
    try:
        torch.save(whole, folder / WEIGHTS_NAME)
    except RuntimeError as error:  # its writer says so of a full disk
        raise OSError(f"{WEIGHTS_NAME} cannot be written: {error}") from error
