"""Run by torchrun (test_trainer.py): two short trainings over two processes, whose results each rank saves."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import Trainer, TrainingArguments

from tests.model.tiny_models import tokens
from tests.model.training import KeepRouterGradients, alike_batch, arguments, trained_model


def train(ids: torch.Tensor, output: Path, batch: int, **overrides: Any) -> dict[str, Any]:
    """Train on ids (each rank takes its part): the trained parameters and the router's gradients by step."""
    model, kept = trained_model(rounds=3), KeepRouterGradients()
    settings = arguments(output, batch, 2, ddp_backend="gloo", **overrides)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, TrainingArguments(**settings), train_dataset=rows, callbacks=[kept]).train()
    assert torch.distributed.get_world_size() == 2
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"parameters": trained, "gradients": kept.steps}


def main(output: Path) -> None:
    """Different data a rank for two steps, and one step over a batch whose rows are alike."""
    torch.set_num_threads(1)
    results = {
        "different": train(tokens(16, 12), output, 4, max_steps=2),
        "alike": train(alike_batch(), output, 4),  # 2 processes * 2 steps * 2 rows
    }
    torch.save(results, output / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
