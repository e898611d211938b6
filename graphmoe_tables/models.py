"""The base models that are known by name, with their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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

PHASES = ("prefill", "decode")  # of a generation: all tokens at once, then one by one


def known_model(name: str) -> str | None:
    """Return the name that `MODEL_SHAPES` has for a model, however its letters are written; None if it has none."""
    return name.casefold() if name.casefold() in MODEL_SHAPES else None


def is_path(name: str) -> bool:
    """Tell whether a name can be a path alone: on the hub a name is ``owner/name``, or one word."""
    return name.startswith(("/", ".", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def model_shape(name: str) -> ModelShape:
    """Return a known model's shape; ``ValueError`` for an unknown one."""
    known = known_model(name)
    if known is None:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODEL_SHAPES)} (--model takes any other model)")
    return MODEL_SHAPES[known]


def check_layers(layers: int | None) -> None:
    """Raise ``ValueError`` for a number of layers below 1."""
    if layers is not None and layers < 1:
        raise ValueError(f"a model must have at least 1 layer, got {layers}")


def check_lengths(lengths: Sequence[int], phases: Sequence[str], positions: int | None) -> None:
    """Raise ``ValueError`` for lengths below 1 or, with the token that a decode step adds, above a model's limit."""
    low = [tokens for tokens in lengths if tokens < 1]
    if low or not lengths:
        raise ValueError(f"a sequence must have at least 1 token, got {', '.join(map(str, low)) or 'no length at all'}")
    longest = max(lengths) + ("decode" in phases)
    if positions is not None and longest > positions:
        added = " and one to decode" if "decode" in phases else ""
        raise ValueError(
            f"a sequence of {max(lengths)} tokens{added} is longer than the model's {positions} positions "
            "(max_position_embeddings); profile shorter ones"
        )
