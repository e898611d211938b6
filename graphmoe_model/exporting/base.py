"""The base model of an export: its weights as the adapter trained them beside its layers, its settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from graphmoe_model.module_names import plain_name


def write_base(base: Any, adapter: str, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """Write the base as Transformers saves it, and return its configuration.

    Modules and tokens that the adapter trained beside its layers (``modules_to_save``, ``trainable_token_indices``)
    take the place of the base's. A head or embedding that is tied by the configuration and no longer equal to what it
    is tied to has weights of its own, and the configuration says so.

    Raises:
        ValueError: the weights are of several dtypes.
    """
    state = _state(base, adapter)
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    if getattr(text, "tie_word_embeddings", False):
        tied = dict(getattr(base, "_tied_weights_keys", None) or {})
        pairs = [(name, source) for name, source in tied.items() if name in state and source in state]
        if all(torch.equal(state[name], state[source]) for name, source in pairs):
            state = {name: tensor for name, tensor in state.items() if name not in tied}
        else:
            config.tie_word_embeddings = text.tie_word_embeddings = False
    # Loading casts to what the configuration names, and `.to` and `.float` leave it as it was.
    config.dtype = text.dtype = _dtype(base, state)
    save_torch_state_dict(state, folder)
    config.save_pretrained(folder)
    write_settings(base, folder, tokenizer)
    return config


def check_generation_settings(base: Any) -> None:
    """Check that Transformers will save the base's generation settings: it loads some that it does not save.

    Raises:
        ValueError: says which contradict each other.
    """
    if getattr(base, "generation_config", None) is None:
        return
    try:
        base.generation_config.validate(strict=True)
    except ValueError as error:
        raise ValueError(
            f"the base's generation settings contradict each other, and Transformers does not save them: "
            f"{' '.join(str(error).split())}; correct its generation_config.json, or model.generation_config"
        ) from error


def write_settings(base: Any, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write what servers look for in a model's own folder, and Transformers beside the weights."""
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def place(name: str) -> str:
    """Return a module's name in the base alone."""
    return ".".join(part for part in plain_name(name).split(".") if part != "base_layer")


def _state(base: nn.Module, adapter: str) -> dict[str, Tensor]:
    beside = {
        place(name): _trained(module, adapter)
        for name, module in base.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    found = {f"{name}.{key}": tensor for name, own in beside.items() for key, tensor in own.items()}
    for key, tensor in base.state_dict().items():
        plain = _base_key(key)
        if plain is not None and not any(plain.startswith(f"{name}.") for name in beside):
            found[plain] = tensor
    return {name: tensor.detach() for name, tensor in found.items()}


def _dtype(base: Any, state: dict[str, Tensor]) -> torch.dtype:
    """The one dtype of the base's parameters, but for those that Transformers holds in fp32 whatever is asked for.

    Raises:
        ValueError: there are several, of which loading would keep one.
    """
    kept = {*(base._keep_in_fp32_modules or ()), *(base._keep_in_fp32_modules_strict or ())}
    buffers = {place(name) for name, _ in base.named_buffers()}
    first: dict[torch.dtype, str] = {}
    for name, own in state.items():
        if name not in buffers and own.is_floating_point() and not any(part in name for part in kept):
            first.setdefault(own.dtype, name)
    if len(first) > 1:
        found = ", ".join(f"{name} is in {str(dtype).removeprefix('torch.')}" for dtype, name in first.items())
        raise ValueError(f"the base's weights are of several dtypes ({found}), and loading keeps one: cast them to one")
    return next(iter(first))


def _trained(module: AuxiliaryTrainingWrapper, adapter: str) -> dict[str, Tensor]:
    """The tensors of a module as the adapter has it, by their names in the module of the base."""
    own: Any = module
    if isinstance(module, ModulesToSaveWrapper):
        trained = adapter in own.modules_to_save
        return dict((own.modules_to_save[adapter] if trained else own.original_module).state_dict())
    assert isinstance(module, TrainableTokensWrapper), type(module)
    layer = own.token_adapter
    with torch.no_grad():
        chosen = [adapter] if adapter in layer.trainable_tokens_delta else []
        return {**layer.base_layer.state_dict(), "weight": layer.get_merged_weights(chosen)}


def _base_key(name: str) -> str | None:
    """A tensor's name in the base alone; None if it is an adapter's."""
    parts = plain_name(name).split(".")
    if any(part == "lora_graphmoe" or part.startswith("lora_") for part in parts):
        return None
    return ".".join(part for part in parts if part != "base_layer")
