"""The router loss under transformers.Trainer: its scale over accumulation, its place in logs.

Two processes: tests/distributed/test_balance_trainers.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from graphmoe_model import RouterLossCallback, router_loss
from tests.model.checkpointing import checkpointing_arguments
from tests.model.tiny_models import PADDING, tiny_model, tiny_peft_model
from tests.model.training import (
    ACCUMULATION,
    KeepRouterGradients,
    alike_batch,
    arguments,
    realistic_batch,
    relative_differences,
    trained_model,
)


def dataset(ids: Tensor) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": row, "attention_mask": (row != PADDING).long(), "labels": row.masked_fill(row == PADDING, -100)}
        for row in ids
    ]


def step(
    model: Any,
    ids: Tensor,
    tmp_path: Path,
    accumulation: int,
    callbacks: list[TrainerCallback] | None = None,
    **overrides: Any,
) -> tuple[Trainer, Tensor]:
    """One optimizer step over ids; the trainer and the router's gradient."""
    kept = KeepRouterGradients()
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, len(ids), accumulation, **overrides)),
        train_dataset=dataset(ids),
        eval_dataset=dataset(ids[:2]),
        callbacks=[kept, *(callbacks or [])],
    )
    trainer.train()
    return trainer, kept.steps[0]


@pytest.mark.parametrize("form", ["paper", "switch"])
def test_accumulation_over_alike_micro_batches_is_exact(form, tmp_path):
    """Trainer adds micro-batch losses up without dividing: unscaled, the router's gradient grows 8-fold."""
    runs = [step(trained_model(router_aux_loss=form), alike_batch(), tmp_path, n) for n in ACCUMULATION]
    assert max(relative_differences([gradient for _, gradient in runs])) < 1e-4
    losses = [trainer.state.log_history[0]["loss"] for trainer, _ in runs]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_accumulation_over_random_micro_batches(tmp_path):
    """With different tokens in each, Eq. 8 of a micro-batch is not the whole batch's: within 1% at 2048 tokens each.

    The router loss alone is compared (coefficient 1 against 0), so that the language loss's share hides nothing.
    """
    gradients = []
    for accumulation in ACCUMULATION:
        with_loss, without = (
            step(trained_model(router_aux_loss_coef=c), realistic_batch(), tmp_path, accumulation)[1]
            for c in (1.0, 0.0)
        )
        gradients.append(with_loss - without)
    assert max(relative_differences(gradients)) < 0.01


def test_ragged_micro_batches_weigh_one_in_all(tmp_path):
    """Micro-batches with few labels weigh less, but all together one: the logged loss is language loss + coef * aux."""
    ids = alike_batch().clone()
    ids[:, 20:] = PADDING
    ids[4:, 10:] = PADDING
    model = trained_model(router_aux_loss_coef=0.5)
    runs = {
        c: step(trained_model(router_aux_loss_coef=c), ids, tmp_path, 8)[0].state.log_history[0] for c in (0.0, 0.5)
    }
    losses = []
    for row in (ids[:1, :20], ids[4:5, :10]):
        model.train()(input_ids=row, labels=row)
        with torch.no_grad():
            losses.append(router_loss(model).item())
    expected = (19 * losses[0] + 9 * losses[1]) / 28
    assert runs[0.5]["loss"] - runs[0.0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_logs_and_evaluation(tmp_path):
    """aux_loss is logged beside loss, which contains it; eval_loss is the language loss alone."""
    model = tiny_peft_model()
    with torch.no_grad():
        row = alike_batch()[:1]
        plain = tiny_model()(input_ids=row, labels=row).loss.item()  # a fresh adapter changes nothing
    trainer, _ = step(model, alike_batch(), tmp_path, 4, [RouterLossCallback()], learning_rate=0.0)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(plain + 0.01 * log["aux_loss"], rel=1e-5)
    assert 0.4 < log["aux_loss"] < 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_callback_needs_an_adapter(tmp_path):
    """A callback that logs nothing would look like a balanced router."""
    trainer = Trainer(
        tiny_model(),
        TrainingArguments(**arguments(tmp_path, 8, 1)),
        train_dataset=dataset(alike_batch()),
        callbacks=[RouterLossCallback()],
    )
    with pytest.raises(TypeError, match="has no GraphMoE adapter"):
        trainer.train()


def test_gradient_checkpointing(tmp_path):
    """Trainer's default kind gives the same gradient; the reentrant kind would drop the router loss and is refused."""
    plain = step(trained_model(), alike_batch(), tmp_path, 4)[1]
    checkpointed = step(trained_model(), alike_batch(), tmp_path, 4, **checkpointing_arguments())[1]
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)
    with pytest.raises(RuntimeError, match="reentrant"):
        step(trained_model(), alike_batch(), tmp_path, 4, **checkpointing_arguments(use_reentrant=True))


def test_label_smoothing_is_reported(tmp_path):
    """Label smoothing hides the labels from the model, so its loss cannot hold the router's: that must be said."""
    with pytest.warns(UserWarning, match="got no labels"):
        step(trained_model(), alike_batch(), tmp_path, 4, label_smoothing_factor=0.1)
