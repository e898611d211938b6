"""Activation checkpointing under the name that the installed Transformers has: from 5.22 on the old ones are deprecated."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments


def checkpoint_activations(model: PeftModel | PreTrainedModel, use_reentrant: bool = False) -> None:
    """Let the model recompute its decoder layers in the backward."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def checkpointing_arguments(enabled: bool = True, **kwargs: Any) -> dict[str, Any]:
    """Make the arguments of TrainingArguments, or of TRL's, that set checkpointing and its keyword arguments."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: enabled, f"{name}_kwargs": kwargs or None}
