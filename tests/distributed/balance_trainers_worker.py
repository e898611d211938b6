"""Trainer and SFTTrainer over one process or several, on the same global micro-batches: test_balance_trainers.py."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import Trainer, TrainingArguments

from graphmoe_model import RouterLossCallback
from tests.model.checkpointing import checkpointing_arguments
from tests.model.method_models import trained_parameters
from tests.model.tiny_models import PADDING, tokens
from tests.model.training import KeepRouterGradients, alike_batch, arguments, trained_model

STEPS = 2


@dataclass(frozen=True)
class Run:
    """How a trainer trains for two steps.

    Attributes:
        rows: ``"ragged"``; ``"as many labels"``: rows of other lengths with as many labels each; ``"alike"``.
        scope: ``router_aux_loss_scope``.
        arguments: of ``TrainingArguments``.
        checkpointing: whether activations are.
        sft: by TRL's trainer.
    """

    rows: str = "ragged"
    scope: str = "global"
    arguments: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    sft: bool = False


def rows(kind: str) -> list[dict[str, Tensor]]:
    """16 rows of 12 tokens, padded on the right: two steps of two micro-batches of four."""
    if kind == "alike":
        return [{"input_ids": row, "labels": row} for row in alike_batch().repeat(2, 1)]
    lengths = torch.randint(4, 13, (16, 1), generator=torch.Generator().manual_seed(4))
    real = torch.arange(12) < lengths
    ids = tokens(16, 12).masked_fill(~real, PADDING)
    labelled = real & (torch.arange(12) >= lengths - 3) if kind == "as many labels" else real
    labels = ids.masked_fill(~labelled, -100)
    return [
        {"input_ids": i, "attention_mask": m, "labels": label}
        for i, m, label in zip(ids, real.long(), labels, strict=True)
    ]


def train(run: Run) -> dict[str, Any]:
    """The router's gradients by step, trained parameters, and logs of this process."""
    processes = distributed.get_world_size() if distributed.is_initialized() else 1
    model = trained_model(rounds=3, router_aux_loss_coef=0.5, router_aux_loss_scope=run.scope)
    kept = KeepRouterGradients()
    with tempfile.TemporaryDirectory() as folder:
        options = {**arguments(folder, 8 // processes, 2), "max_steps": STEPS, "lr_scheduler_type": "constant"}
        options |= {"ddp_backend": "gloo"} if processes > 1 else {}
        options |= checkpointing_arguments() if run.checkpointing else {}
        options |= run.arguments
        trainer = _sft(model, options, kept) if run.sft else _plain(model, options, kept, rows(run.rows))
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "gradients": dict(enumerate(kept.steps)),
        "parameters": {name: p.detach().clone() for name, p in trained_parameters(model).items()},
        "loss": [log["loss"] for log in logs],
        "aux_loss": [log["aux_loss"] for log in logs],
    }


def _plain(model: Any, options: dict[str, Any], kept: KeepRouterGradients, data: list[dict[str, Tensor]]) -> Trainer:
    settings = TrainingArguments(**options)
    return Trainer(model, settings, train_dataset=data, callbacks=[kept, RouterLossCallback()])


def _sft(model: Any, options: dict[str, Any], kept: KeepRouterGradients) -> Trainer:
    import datasets
    import trl

    from tests.model.test_sft import tokenizer

    ids = [row["input_ids"][row["input_ids"] != PADDING].tolist() for row in rows("ragged")]
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**{"max_length": None, "bf16": False, **options}),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer(),
        callbacks=[kept],
    )


def run_all(runs: dict[str, Run]) -> dict[str, Any]:
    """Every run, in one pair of processes."""
    return {name: train(run) for name, run in runs.items()}
