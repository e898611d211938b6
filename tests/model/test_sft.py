"""The router loss under TRL's SFTTrainer, which ignores outputs.loss: scale over accumulation, logs, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.model.checkpointing import checkpointing_arguments
from tests.model.tiny_models import VOCABULARY, tiny_model, tiny_peft_model
from tests.model.training import (
    ACCUMULATION,
    KeepRouterGradients,
    alike_batch,
    arguments,
    realistic_batch,
    relative_differences,
    trained_model,
)

datasets = pytest.importorskip("datasets")  # the train extra; a machine may run the other tests without it
trl = pytest.importorskip("trl")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def sft(model: Any, ids: Tensor, tmp_path: Path, accumulation: int, **overrides: Any) -> tuple[Any, Tensor]:
    """One optimizer step over ids, in fp32 unless asked; the trainer and the router's gradient."""
    kept = KeepRouterGradients()
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            **arguments(tmp_path, len(ids), accumulation, **{"max_length": None, "bf16": False, **overrides})
        ),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=tokenizer(),
        callbacks=[kept],
    )
    trainer.train()
    return trainer, kept.steps[0]


@pytest.mark.parametrize("form", ["paper", "switch"])
def test_accumulation_over_alike_micro_batches_is_exact(form, tmp_path):
    """TRL adds coef * outputs.aux_loss by itself and divides by the accumulation steps: once, not twice."""
    runs = [sft(trained_model(router_aux_loss=form), alike_batch(), tmp_path, n) for n in ACCUMULATION]
    assert max(relative_differences([gradient for _, gradient in runs])) < 1e-4
    logs = [trainer.state.log_history[0] for trainer, _ in runs]
    assert [log["loss"] for log in logs] == pytest.approx([logs[0]["loss"]] * 3, rel=1e-4)
    assert [log["aux_loss"] for log in logs] == pytest.approx([logs[0]["aux_loss"]] * 3, rel=1e-4)


def test_accumulation_over_random_micro_batches(tmp_path):
    """As under Trainer: within 1% at 2048 tokens a micro-batch, for the whole of the router's gradient."""
    gradients = [sft(trained_model(), realistic_batch(), tmp_path, n)[1] for n in ACCUMULATION]
    assert max(relative_differences(gradients)) < 0.01


def test_router_loss_is_in_the_loss_and_in_the_logs(tmp_path):
    """loss = language loss + coef * aux_loss in training; eval_loss is the language loss, eval_aux_loss zero."""
    row = alike_batch()[:1]
    with torch.no_grad():
        plain = tiny_model()(input_ids=row, labels=row).loss.item()  # a fresh adapter changes nothing
    trainer, gradient = sft(tiny_peft_model(), alike_batch(), tmp_path, 4, learning_rate=0.0)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(plain + 0.01 * log["aux_loss"], rel=1e-5)
    assert 0.4 < log["aux_loss"] < 2
    assert gradient.norm() > 0, "the router of a fresh adapter gets a gradient from the router loss alone"
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert metrics["eval_aux_loss"] == 0.0


def test_without_checkpointing_and_in_bf16(tmp_path):
    """SFTTrainer checkpoints by default; mixed precision rebuilds the outputs, which must not lose aux_loss."""
    with_checkpoints = sft(trained_model(), alike_batch(), tmp_path, 4)[1]
    without = sft(trained_model(), alike_batch(), tmp_path, 4, **checkpointing_arguments(False))[1]
    torch.testing.assert_close(without, with_checkpoints, rtol=1e-5, atol=1e-8)
    trainer, _ = sft(trained_model(), alike_batch(), tmp_path, 4, bf16=True)
    assert trainer.state.log_history[0]["aux_loss"] > 0


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_coefficient_of_the_trainer_wins(coefficient, tmp_path):
    """SFTConfig(router_aux_loss_coef=...) is documented to override the model's; 0 turns the loss off."""
    row = alike_batch()[:1]
    with torch.no_grad():
        plain = tiny_model()(input_ids=row, labels=row).loss.item()
    log = sft(tiny_peft_model(), alike_batch(), tmp_path, 1, router_aux_loss_coef=coefficient)[0].state.log_history[0]
    assert log["loss"] == pytest.approx(plain + coefficient * log.get("aux_loss", 0.0), rel=1e-5)
    assert ("aux_loss" in log) == (coefficient > 0)


def test_adapter_without_router_loss(tmp_path):
    """router_aux_loss_coef=0 in the adapter's configuration: TRL sees an ordinary model."""
    log = sft(tiny_peft_model(router_aux_loss_coef=0.0), alike_batch(), tmp_path, 1)[0].state.log_history[0]
    assert "aux_loss" not in log
