"""Activation checkpointing under the name that the installed Transformers has: the newest deprecates "gradient"."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

NAME = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def checkpoint_activations(model: nn.Module, every_n_layers: int = 1, **kwargs: Any) -> None:
    """Let a Transformers model run its decoder layers again in the backward pass; other arguments are checkpoint's."""
    getattr(model, f"{NAME}_enable")({"use_reentrant": False, **kwargs}, every_n_layers=every_n_layers)


def keep_activations(model: nn.Module) -> None:
    """Undo `checkpoint_activations`."""
    getattr(model, f"{NAME}_disable")()


def checkpointing_arguments(enabled: bool = True, **kwargs: Any) -> dict[str, Any]:
    """Make the arguments of TrainingArguments, or of TRL's, that set checkpointing and its keyword arguments."""
    return {NAME: enabled, f"{NAME}_kwargs": kwargs or None}
