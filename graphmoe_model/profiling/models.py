"""The models that the command profiles: known shapes with random weights; models and adapters by name or folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graphmoe_model.base_models import ModelSource, load_base_model, model_config, model_shape
from graphmoe_model.checkpoints import saved_adapter_config
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.profiling.out_of_memory import check_fits, memory_error
from graphmoe_tables.methods import preset_settings


def profiled_config(name: str, layers: int | None = None) -> Any:
    """Make a known model's configuration, with as many layers as a profile builds unless asked otherwise.

    Raises:
        ValueError: no model of that name is known, or fewer than one layer is asked for.
    """
    return model_config(name, model_shape(name).profiled_layers if layers is None else layers)


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build a causal language model with random weights; ``MemoryError`` if it does not fit."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    check_fits(parameters, dtype, device)
    with memory_error("the model", "ask for fewer layers or a smaller dtype"), torch.random.fork_rng():
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved_model(name: str, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """Load a model of the hub or of a folder, in its own dtype unless one is given.

    Raises:
        ValueError: there is none by that name, it is an adapter, or its files lack weights.
        MemoryError: it does not fit.
    """
    source = ModelSource(name, dtype=dtype, device=str(device))
    with memory_error("the model", "choose a smaller dtype"):
        return load_base_model(source)


@contextmanager
def with_fresh(model: nn.Module, method: str, rounds: int, **settings: Any) -> Iterator[tuple[nn.Module, str]]:
    """Give the model a fresh adapter of a base method at its published sizes with this many rounds, and a title.

    No weight of the adapter is zero, so that no product is trivial. Afterwards the model is as before.

    Raises:
        ValueError: an unknown method, rounds that it does not have, or a model that cannot be adapted.
    """
    published = {**preset_settings(method), "rounds": rounds}
    config = GraphMoEConfig(init_lora_weights=False, task_type="CAUSAL_LM", **published | settings)
    with _attached(lambda: get_peft_model(model, config)) as adapted:
        yield adapted, adapter_title(config)


@contextmanager
def with_adapter(model: nn.Module, path: str, **settings: Any) -> Iterator[tuple[nn.Module, str]]:
    """Give the model a saved adapter, and a title; ``settings`` overrule a GraphMoE adapter's own.

    Raises:
        ValueError: there is no adapter, it does not fit the model, or it knows no such settings.
    """
    config = saved_adapter_config(path)
    if config.is_prompt_learning:
        raise ValueError(
            f"{path} is an adapter of {type(config).__name__}, virtual tokens: it changes no module's time"
        )
    if settings and not isinstance(config, GraphMoEConfig):
        names = " and ".join(settings)
        raise ValueError(f"{path} is an adapter of {type(config).__name__}, which has no {names}; leave them out")
    for name, value in settings.items():
        setattr(config, name, value)
    config.inference_mode = True
    with _attached(lambda: PeftModel.from_pretrained(model, path, config=config)) as adapted:
        yield adapted, adapter_title(config)


def adapter_title(config: PeftConfig) -> str:
    """Return what a profile calls an adapter."""
    if not isinstance(config, GraphMoEConfig):
        return {"LORA": "LoRA"}.get(str(getattr(config.peft_type, "value", config.peft_type)), str(config.peft_type))
    if config.base_method.routers is None:
        return config.title  # no experts, and so no rounds
    return f"{config.title}, T = {config.rounds}"


@contextmanager
def _attached(attach: Any) -> Iterator[nn.Module]:
    with memory_error("the adapter", "choose a smaller dtype or fewer layers"):
        try:
            adapted = attach()
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot attach the adapter: {error}") from error
    try:
        yield adapted
    finally:
        adapted.unload()
