"""Activation checkpointing under the name that the installed Transformers has: the newest deprecates "gradient"."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

NAME = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def checkpoint_activations(model: PeftModel | PreTrainedModel, use_reentrant: bool = False) -> None:
    """Let the model run its decoder layers again in the backward pass."""
    getattr(model, f"{NAME}_enable")({"use_reentrant": use_reentrant})


def keep_activations(model: PeftModel | PreTrainedModel) -> None:
    """Undo `checkpoint_activations`."""
    getattr(model, f"{NAME}_disable")()


def checkpointing_arguments(enabled: bool = True, **kwargs: Any) -> dict[str, Any]:
    """Make the arguments of TrainingArguments, or of TRL's, that set checkpointing and its keyword arguments."""
    return {NAME: enabled, f"{NAME}_kwargs": kwargs or None}
