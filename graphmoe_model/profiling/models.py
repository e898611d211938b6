"""The models that the command profiles: presets with random weights, and models and adapters from a name or folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.profiling.memory import check_fits, memory_error


class Preset(NamedTuple):
    """A model's sizes by their names in Transformers; ``layers`` is how many are built unless asked otherwise."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    layers: int


# The real models' sizes, layer for layer. Fewer layers leave the shares within a layer as they are among themselves,
# and give the embeddings and the head ("other") more weight.
PRESETS = {
    "tiny": Preset("llama", 512, 1408, 8, 8, 64, 2048, 16384, False, layers=2),
    "llama-3.2-1b": Preset("llama", 2048, 8192, 32, 8, 64, 128256, 131072, True, layers=4),
    "llama-3-8b": Preset("llama", 4096, 14336, 32, 8, 128, 128256, 8192, False, layers=4),
    "qwen3-4b": Preset("qwen3", 2560, 9728, 32, 8, 128, 151936, 40960, True, layers=4),
}


def preset_config(name: str, layers: int | None = None) -> Any:
    """The configuration of a preset; ``ValueError`` for an unknown one or fewer than one layer."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)} (--model takes any other model)")
    if layers is not None and layers < 1:
        raise ValueError(f"a model must have at least 1 layer, got {layers}")
    sizes = PRESETS[name]._asdict()
    return AutoConfig.for_model(
        sizes.pop("model_type"), **{**sizes, "num_hidden_layers": layers or sizes.pop("layers")}, name_or_path=name
    )


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model with random weights; ``MemoryError`` if it does not fit."""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    check_fits(parameters, dtype, device)
    with memory_error("the model", "ask for fewer layers or a smaller dtype"), torch.random.fork_rng():
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved_model(name: str, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """A model of the hub or of a folder, in its own dtype unless one is given.

    Raises:
        ValueError: there is none by that name, or it is an adapter.
        MemoryError: it does not fit.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ValueError(f"there is no folder {name} to load a model from")
    if (Path(name) / "adapter_config.json").exists():
        raise ValueError(f"{name} is an adapter: pass its base model with --model and the adapter with --adapter")
    with memory_error("the model", "choose a smaller dtype"):
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if dtype is None else dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the model {name!r}: {_first_line(error)}") from error
        return model.to(device)


@contextmanager
def with_rounds(model: nn.Module, rounds: int, **settings: Any) -> Iterator[tuple[nn.Module, str]]:
    """The model with a fresh adapter of this many rounds, and what to call it; 0 is the plain model.

    No weight of the adapter is zero, so that no product is trivial. Afterwards the model is as before.

    Raises:
        ValueError: rounds below 0; the model cannot be adapted.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be 0 (no adapter) or more, got {rounds}")
    if rounds == 0:
        yield model, "none"
        return
    config = GraphMoEConfig(rounds=rounds, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    with _attached(lambda: get_peft_model(model, config)) as adapted:
        yield adapted, adapter_title(config)


@contextmanager
def with_adapter(model: nn.Module, path: str, **settings: Any) -> Iterator[tuple[nn.Module, str]]:
    """The model with a saved adapter, and what to call it; ``settings`` overrule a GraphMoE adapter's own.

    Raises:
        ValueError: there is no adapter, it does not fit the model, or it knows no such settings.
    """
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load the adapter {path!r}: {_first_line(error)}") from error
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
    """What a profile calls an adapter."""
    if not isinstance(config, GraphMoEConfig):
        return {"LORA": "LoRA"}.get(str(getattr(config.peft_type, "value", config.peft_type)), str(config.peft_type))
    return f"{'MixLoRA' if config.rounds == 1 else 'GraphMoE'} (T={config.rounds})"


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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
