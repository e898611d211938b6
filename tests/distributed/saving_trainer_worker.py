"""Trainer's own saves and loads over two processes, for test_saving_trainer.py: what is in the files, what is back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.distributed.on_cpu import shard_on_cpu
from tests.distributed.saving_worker import trained_model
from tests.model.adapter_folders import WEIGHTS
from tests.model.tiny_models import tokens

CHECKPOINTED = {"activation_checkpointing": True, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": CHECKPOINTED},
    "fsdp2 sharded": {"fsdp": True, "fsdp_config": {**CHECKPOINTED, "state_dict_type": "SHARDED_STATE_DICT"}},
    **{
        f"zero{stage}": {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "zero_optimization": {
                    "stage": stage,
                    "stage3_param_persistence_threshold": 0,
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
            }
        }
        for stage in (2, 3)
    },
}


class Kept(TrainerCallback):
    """Keeps the adapter as it is when training begins and after each step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Tensor]] = {}
        self.trainer: Trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps[state.global_step] = whole(self.trainer.model)

    on_step_end = on_train_begin


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name, gathered by each one itself."""
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            found[name] = (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()
    return {name.replace("_checkpoint_wrapped_module.", "").replace(".default", ""): t for name, t in found.items()}


def trainer(strategy: str, folder: str, steps: int, **options: Any) -> tuple[Trainer, Kept]:
    """A Trainer that saves and evaluates after every step."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 8)]
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
    }
    arguments = TrainingArguments(folder, **{**settings, **STRATEGIES[strategy], **options})
    kept = Kept()
    model = trained_model(modules_to_save=None, use_dora=False)
    kept.trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[kept])
    return kept.trainer, kept


def save_and_resume(strategy: str, folder: str) -> dict[str, Any]:
    """Train two steps, save; load the best step; resume at the second for a third, beside a run of three at once."""
    shard_on_cpu()  # DDP too: with use_cpu=True, Trainer resumes no optimizer over several processes ("cpu:0")
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP would ask for a GPU by its number
    found: dict[str, Any] = {}
    straight, kept = trainer(strategy, f"{folder}/three", 3, load_best_model_at_end=True)
    straight.train()
    found["straight"] = kept.steps
    found["shards"] = any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in straight.model.parameters())
    found["best"] = Path(straight.state.best_model_checkpoint).name
    found["after best"] = whole(straight.model)
    straight.save_model(f"{folder}/final")
    found["final"] = saved(f"{folder}/final")
    state = straight.accelerator.get_state_dict(straight.model_wrapped)
    main = straight.accelerator.is_main_process
    straight.model.save_pretrained(f"{folder}/by hand", state_dict=state, is_main_process=main)
    found["by hand"] = saved(f"{folder}/by hand")
    found["checkpoints"] = {step: saved(f"{folder}/three/checkpoint-{step}") for step in (1, 2, 3)}
    if strategy == "fsdp2 sharded":
        straight.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        straight.save_model(f"{folder}/gathered")
        found["gathered"] = saved(f"{folder}/gathered")
    resumed, kept = trainer(strategy, f"{folder}/resumed", 3)
    resumed.train(resume_from_checkpoint=f"{folder}/three/checkpoint-2")
    found["resumed"] = kept.steps
    return found


def saved(folder: str) -> dict[str, Tensor] | None:
    """What a folder's adapter holds, once all ranks have saved; None if there is none."""
    distributed.barrier()
    path = Path(folder) / WEIGHTS
    return load_file(path) if path.exists() else None
