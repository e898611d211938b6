"""Training with Trainer, and scoring by the first token of the answer."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from graphmoe_model.demo.base import IGNORED
from graphmoe_model.demo.task import LABELS, Question


class TrainingRun(NamedTuple):
    """What a training left behind.

    Attributes:
        losses: (step, loss) as logged, each the mean since the one before.
        mean_loss: over all steps; not finite if any step's was not.
        step_ms: milliseconds of every step, without fetching its batch.
    """

    losses: list[tuple[int, float]]
    mean_loss: float
    step_ms: list[float]


class ProgressBar(TrainerCallback):
    """One line: steps done, time left, the last loss. Keeps the losses and the steps' times."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.losses: list[tuple[int, float]] = []
        self.step_ms: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", leave=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Its batch is there; from here the step is timed."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.step_ms.append(1000 * (time.perf_counter() - self.started))
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show and keep the loss."""
        logs = kwargs["logs"]
        if "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))
            self.bar.set_postfix(loss=f"{self.losses[-1][1]:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    data: Dataset,
    *,
    title: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> TrainingRun:
    """Train what is trainable in ``model`` with transformers' Trainer."""
    progress = ProgressBar(title)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            adam_beta2=0.98,
            warmup_steps=max(1, steps // 15),
            lr_scheduler_type="cosine",
            logging_steps=max(1, steps // 50),
            logging_nan_inf_filter=False,  # with it a loss that is not finite would be logged as an earlier one
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[progress])
        trainer.remove_callback(PrinterCallback)
        mean_loss = trainer.train().training_loss
    return TrainingRun(progress.losses, mean_loss, progress.step_ms)


@torch.no_grad()
def answer_logits(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, questions: list[Question], batch_size: int = 100
) -> Tensor:
    """The four labels' logits after each prompt, [questions, 4]."""
    labels = torch.tensor([tokenizer.encode(f" {label}")[-1] for label in LABELS])
    model.eval()
    found = []
    for start in range(0, len(questions), batch_size):
        prompts = [tokenizer.bos_token + question.prompt for question in questions[start : start + batch_size]]
        batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        found.append(model(**batch, logits_to_keep=1).logits[:, -1, labels])
    return torch.cat(found)


def accuracy(logits: Tensor, questions: list[Question]) -> dict[str, float]:
    """The share of questions whose right label has the largest logit, by skill."""
    right: dict[str, list[bool]] = defaultdict(list)
    for choice, question in zip(logits.argmax(dim=-1).tolist(), questions, strict=True):
        right[question.skill].append(choice == question.answer)
    return {skill: sum(hits) / len(hits) for skill, hits in right.items()}
