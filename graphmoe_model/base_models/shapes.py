"""Base models by name: the shapes of known ones, and the configurations of others from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from graphmoe_model.messages import first_line


class ModelShape(NamedTuple):
    """A decoder-only model's sizes by their names in Transformers.

    Attributes:
        num_hidden_layers: as many as the real model has.
        profiled_layers: how many of them a profile builds unless asked otherwise.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_hidden_layers: int
    profiled_layers: int


# From the models' published config.json; "tiny" is nobody's. A profile of fewer layers leaves the shares within a layer
# as they are among themselves, and gives the embeddings and the head ("other") more weight.
MODEL_SHAPES = {
    "tiny": ModelShape("llama", 512, 1408, 8, 8, 64, 2048, 16384, False, num_hidden_layers=2, profiled_layers=2),
    "llama-3.2-1b": ModelShape(
        "llama", 2048, 8192, 32, 8, 64, 128256, 131072, True, num_hidden_layers=16, profiled_layers=4
    ),
    "llama-3-8b": ModelShape(
        "llama", 4096, 14336, 32, 8, 128, 128256, 8192, False, num_hidden_layers=32, profiled_layers=4
    ),
    "llama-3-70b": ModelShape(
        "llama", 8192, 28672, 64, 8, 128, 128256, 8192, False, num_hidden_layers=80, profiled_layers=1
    ),
    "qwen3-4b": ModelShape(
        "qwen3", 2560, 9728, 32, 8, 128, 151936, 40960, True, num_hidden_layers=36, profiled_layers=4
    ),
}


def model_shape(name: str) -> ModelShape:
    """A known model's shape; ``ValueError`` for an unknown one."""
    if name not in MODEL_SHAPES:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODEL_SHAPES)} (--model takes any other model)")
    return MODEL_SHAPES[name]


def model_config(name: str, layers: int | None = None) -> Any:
    """A known model's configuration, with another number of layers if one is given.

    Raises:
        ValueError: no model of that name is known, or fewer than one layer is asked for.
    """
    if layers is not None and layers < 1:
        raise ValueError(f"a model must have at least 1 layer, got {layers}")
    sizes = model_shape(name)._asdict()
    del sizes["profiled_layers"]
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes, name_or_path=name)


def load_config(name: str) -> Any:
    """The configuration of a known model, or else the config.json of a folder or of a model on the hub.

    Nothing but the configuration is read, and no code of the model's is run.

    Raises:
        ValueError: there is none by that name, or it is an adapter.
    """
    if name in MODEL_SHAPES:
        return model_config(name)
    check_is_model(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        known = ", ".join(MODEL_SHAPES)
        raise ValueError(
            f"cannot read the configuration of the model {name!r}: {first_line(error).rstrip('.')} "
            f"(known by name: {known})"
        ) from error


def check_is_model(name: str) -> None:
    """``ValueError`` for a path that is no folder, and for an adapter's folder."""
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ValueError(f"there is no folder {name} to load a model from")
    if (Path(name) / "adapter_config.json").exists():
        raise ValueError(f"{name} is an adapter: pass its base model with --model and the adapter with --adapter")
