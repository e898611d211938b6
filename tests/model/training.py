"""What the tests of Trainer and SFTTrainer share: batches, a callback that keeps the router's gradient, one step."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from tests.model.tiny_models import tiny_config, tiny_model, tokens

ACCUMULATION = (1, 4, 8)


class KeepRouterGradients(TrainerCallback):
    """The router's gradient of every optimizer step, as the optimizer gets it."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append(torch.cat([p.grad.flatten().clone() for n, p in named if "router.weight" in n]))


def trained_model(**overrides: Any) -> PeftModel:
    """One layer, two rounds, every term of the layer non-zero: the language loss moves the router as well."""
    base = tiny_model(num_hidden_layers=1, max_position_embeddings=512)
    return get_peft_model(base, tiny_config(**{"rounds": 2, "init_lora_weights": False, **overrides}))


def alike_batch() -> Tensor:
    """[8, 24]: every row, and so every micro-batch, has the same tokens."""
    return tokens(1, 24).expand(8, -1)


def realistic_batch() -> Tensor:
    """[64, 256] random tokens: 2048 of them in each of eight micro-batches."""
    return tokens(64, 256)


def arguments(output_dir: Any, batch: int, accumulation: int, **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments for one step over the batch; nothing is clipped, saved or reported."""
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": batch // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return {**settings, **overrides}


def relative_differences(gradients: list[Tensor]) -> list[float]:
    """|g - g_1| / |g_1| of every gradient against the first."""
    first = gradients[0]
    return [((g - first).norm() / first.norm()).item() for g in gradients]
