"""Trainer, SFTTrainer and DPOTrainer as a user's script runs them, in one process or in each of several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    training_args,
)

from tests.distributed.on_cpu import shard_on_cpu
from tests.distributed.what_is_held import what_is_held
from tests.model.loop_trainers import pairs, texts, token_rows, words
from tests.model.tiny_models import tiny_config

ROWS = 4  # a step's, of all processes together
TRAINERS = {
    "Trainer": (Trainer, TrainingArguments, token_rows),
    "SFT": (trl.SFTTrainer, trl.SFTConfig, texts),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, pairs),
}


def train_each(trainers: list[str], base: str, folder: str, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`train` with each of the trainers, each with a model of its own; adapters are saved in ``folder/<trainer>``."""
    return {kind: train(kind, base, str(Path(folder) / kind), options) for kind in trainers}


def train(
    kind: str,
    base: str,
    folder: str,
    options: dict[str, Any],
    loading: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Load a base model in Trainer's order, after the arguments (under zero.Init with ZeRO-3), and train it.

    Args:
        kind, folder, options: as in `train_model`.
        base: the base model's folder.
        loading: arguments of ``from_pretrained``.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not plain_ddp():
        shard_on_cpu()
        training_args.is_torch_bf16_gpu_available = lambda: True  # the CPU's arithmetic has it too
    arguments = _arguments(kind, folder, options)
    return _train(kind, AutoModelForCausalLM.from_pretrained(base, **(loading or {})), arguments)


def train_model(kind: str, base: PreTrainedModel, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Attach an adapter, take two steps over four rows of unequal length, and save it in ``folder``.

    Args:
        kind: of `TRAINERS`.
        base: the model to adapt.
        folder: where the adapter is saved.
        options: of the trainer's arguments.

    Returns:
        What each process holds (`what_is_held`), and the losses.
    """
    return _train(kind, base, _arguments(kind, folder, options))


def _train(kind: str, base: PreTrainedModel, arguments: TrainingArguments) -> dict[str, Any]:
    trainer_class, _, data = TRAINERS[kind]
    datasets.disable_progress_bars()
    more: dict[str, Any] = {"processing_class": words("left")}
    if kind == "Trainer":
        more = {"data_collator": DataCollatorForTokenClassification(words())}
    trainer = trainer_class(with_adapter(base), args=arguments, train_dataset=data(ROWS), **more)
    trainer.train()
    held = what_is_held(trainer)
    trainer.save_model(arguments.output_dir)  # gathers what is sharded, so on every rank
    return held | {"losses": [log["loss"] for log in trainer.state.log_history if "loss" in log]}


def with_adapter(model: PreTrainedModel) -> PeftModel:
    """The model with an adapter whose every term counts, the same at every call."""
    torch.manual_seed(1)
    return get_peft_model(model, tiny_config(init_lora_weights=False, router_aux_loss_coef=0.0))


def plain_ddp() -> bool:
    """Whether ``accelerate launch`` asked for neither FSDP nor DeepSpeed."""
    return not any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def _arguments(kind: str, folder: str, options: dict[str, Any]) -> TrainingArguments:
    """SGD, as Adam turns the rounding of a gradient near zero into a whole step; nothing clipped or reported."""
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS // int(os.environ.get("WORLD_SIZE", 1)),
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": plain_ddp(),
        "bf16": False,
        "disable_tqdm": True,
    }
    return TRAINERS[kind][1](**{**settings, **options})
