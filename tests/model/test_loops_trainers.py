"""The table of docs/training.md: every trainer under every setting trains, or says why not."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.model.checkpointing import NAME, checkpointing_arguments
from tests.model.loop_trainers import KINDS, Outcome, RewardTrainerWithRouterLoss, trained, trl

# One in the default run: the trainers differ in what stands between forward and backward, their variants less.
DEFAULTS = ("SFT", "DPO", "KTO", "GRPO", "Reward", "Trainer")
BY_DEFAULT = [kind if kind in DEFAULTS else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def check_trained(outcome: Outcome, logs: bool) -> None:
    """Finite losses, every part of the adapter moved, Eq. 8 in the logs where the trainer logs it."""
    assert len(outcome.logs) == len(outcome.gradients) == 2
    assert all(math.isfinite(log["loss"]) for log in outcome.logs)
    assert [0.3 < log["aux_loss"] < 3 for log in outcome.logs if "aux_loss" in log] == [True, True][: 2 * logs]
    parameters = dict(outcome.trainer.model.named_parameters())
    idle = [name for name, before in outcome.start.items() if torch.equal(parameters[name], before)]
    assert not idle
    for part in ("router.weight", "gru.update_gate", "gru.reset_gate", "experts.down_proj.B", "q_proj.lora_A"):
        assert any(part in name for name in outcome.start), part


def check_same_gradients(found: Outcome, expected: Outcome, bound: float = 1e-6, steps: int = 1) -> None:
    """Of the first steps, relative to each parameter's norm."""
    for a, b in zip(found.gradients[:steps], expected.gradients[:steps], strict=True):
        assert a.keys() == b.keys()
        floor = 1e-6 * max(gradient.norm() for gradient in b.values())
        off = {n: ((a[n] - g).norm() / g.norm().clamp(min=floor)).item() for n, g in b.items()}
        assert max(off.values()) <= bound, {name: error for name, error in off.items() if error > bound}
        assert all(g.any() for name, g in b.items() if "router" in name)


# --- plain and checkpointed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BY_DEFAULT)
def test_checkpointing(kind, tmp_path):
    """The trainer at its defaults (TRL checkpoints, in bf16), and the gradients of a run without checkpointing."""
    plain = trained(kind, tmp_path, **checkpointing_arguments(False))
    check_trained(plain, KINDS[kind].logs)
    defaults = checkpointing_arguments() if kind == "Trainer" else {}
    checkpointed = trained(kind, tmp_path, **defaults)
    assert getattr(checkpointed.trainer.args, NAME)
    check_trained(checkpointed, KINDS[kind].logs)
    check_same_gradients(checkpointed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEFAULTS)
def test_reentrant_checkpointing_is_refused(kind, tmp_path):
    """It runs the layers without a graph: the router would train on nothing. Trainer and TRL leave it to the user."""
    options = checkpointing_arguments(use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"reentrant activation checkpointing.*'use_reentrant': False"):
        trained(kind, tmp_path, **options)


# --- packing and padding-free ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "Trainer"])
def test_padding_free(kind, tmp_path):
    """The batch as one sequence without a mask has the gradients of the padded batch: the same tokens count."""
    options: dict[str, Any] = {"bf16": False, "max_length": None} if kind == "SFT" else {}
    padded = trained(kind, tmp_path, **options)
    if kind == "SFT":
        flat = trained(kind, tmp_path, padding_free=True, **options)
    else:
        flat = trained(kind, tmp_path, more={"data_collator": DataCollatorWithFlattening()}, **options)
    check_trained(flat, logs=True)
    check_same_gradients(flat, padded, bound=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing(strategy, tmp_path):
    """SFT: several rows in one sequence of max_length, with and without boundaries."""
    packed = trained("SFT", tmp_path, rows_a_step=2, packing=True, packing_strategy=strategy, max_length=8)
    check_trained(packed, logs=True)


@pytest.mark.slow
def test_padding_free_dpo_is_what_trl_makes_of_it(tmp_path, caplog):
    """TRL 1.16 says that it pads, and does: the gradients are those of the padded batch."""
    logger = trl.trainer.dpo_trainer.logger.logger
    logger.addHandler(caplog.handler)
    try:
        flat = trained("DPO", tmp_path, padding_free=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert "`padding_free=True` is temporarily unavailable" in caplog.text
    check_same_gradients(flat, trained("DPO", tmp_path))


@pytest.mark.parametrize("option", ["packing", "padding_free"])
@pytest.mark.parametrize("kind", ["KTO", "GRPO", "Reward"])
def test_trainers_without_packing(kind, option, tmp_path):
    """TRL has no such option there; the day it has one, this table has a new cell."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        trained(kind, tmp_path, **{option: True})


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", DEFAULTS)
def test_accumulation(kind, tmp_path):
    """Two micro-batches of the same rows have the gradients of one batch of both: nothing grows with the steps.

    GRPO's completions are the most probable ones and so all alike: its gradient is then the router loss's alone.
    """
    distinct = {"KTO": 1, "GRPO": 1}.get(kind, 2)
    options: dict[str, Any] = {"GRPO": {"top_k": 1}}.get(kind, {})
    options |= {**checkpointing_arguments(), "bf16": False, "distinct": distinct}
    whole = trained(kind, tmp_path, **options)
    halves = trained(kind, tmp_path, accumulation=2, **options)
    check_same_gradients(halves, whole, bound=1e-4)
    for a, b in zip(halves.logs, whole.logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-6)
        assert a.get("aux_loss", 0.0) == pytest.approx(b.get("aux_loss", 0.0), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_of_other_micro_batches(kind, tmp_path):
    """Micro-batches of other padding, checkpointed and not."""
    plain = trained(kind, tmp_path, rows_a_step=6, accumulation=3, **checkpointing_arguments(False))
    checkpointed = trained(kind, tmp_path, rows_a_step=6, accumulation=3, **checkpointing_arguments())
    check_trained(checkpointed, KINDS[kind].logs)
    check_same_gradients(checkpointed, plain)


# --- two forwards before one backward --------------------------------------------------------------------------------


class TwoForwards:
    """Before a trainer: its loss on this batch and on the one before, whose padding is another."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        before, self.before = getattr(self, "before", inputs), dict(inputs)
        first = super().compute_loss(model, dict(before), **kwargs)  # type: ignore[misc]
        return first + super().compute_loss(model, dict(inputs), **kwargs)  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_forwards(kind, tmp_path):
    """A trainer whose loss takes two forwards: each keeps its own padding, checkpointed or not."""
    twice = type("Twice", (TwoForwards, KINDS[kind].trainer), {})
    options: dict[str, Any] = {"trainer": twice, "optim": "sgd"}
    plain = trained(kind, tmp_path, **checkpointing_arguments(False), **options)
    checkpointed = trained(kind, tmp_path, **checkpointing_arguments(), **options)
    check_trained(checkpointed, KINDS[kind].logs)
    check_same_gradients(checkpointed, plain, steps=2)


# --- losses that a trainer computes past the model -------------------------------------------------------------------


def test_reward_trainer_says_that_the_router_loss_is_left_out(tmp_path):
    """TRL's RewardTrainer computes its loss from the scores: without the six lines of docs/training.md, a warning."""
    with pytest.warns(UserWarning, match=r"its router loss became part of no loss: add graphmoe_model\.router_loss"):
        trained("Reward", tmp_path, trainer=trl.RewardTrainer)
    assert RewardTrainerWithRouterLoss is KINDS["Reward"].trainer


@pytest.mark.slow
@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_sft_with_a_loss_of_ones_own(option, tmp_path):
    """SFTTrainer then takes the metrics from a second forward without a gradient, and leaves out every router loss."""

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    given: dict[str, Any] = {option: 0.1} if option == "label_smoothing_factor" else {"more": {option: loss}}
    plain = trained("SFT", tmp_path, **checkpointing_arguments(False), **given)
    with pytest.warns(UserWarning, match="its router loss became part of no loss"):
        checkpointed = trained("SFT", tmp_path, **given)
    (a, *_), (b, *_) = checkpointed.gradients, plain.gradients
    assert all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-7) for name in b)


@pytest.mark.slow
def test_dpo_options(tmp_path):
    """Evaluations between steps, and reference scores computed beforehand; TRL's own refusal of a moving reference."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "precompute_ref_log_probs": True}
    outcome = trained("DPO", tmp_path, more={"eval_dataset": KINDS["DPO"].data(2)}, **options)
    check_trained(outcome, logs=True)
    evaluations = [log for log in outcome.trainer.state.log_history if "eval_loss" in log]
    assert [log["eval_aux_loss"] for log in evaluations] == [0.0, 0.0]
    with pytest.raises(NotImplementedError, match="`sync_ref_model=True` while using a PEFT model"):
        trained("DPO", tmp_path, sync_ref_model=True)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_tests_that_exist():
    """docs/training.md says which test holds what."""
    root = Path(__file__).resolve().parents[2]
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", (root / "docs" / "training.md").read_text()))
    folders = (root / "tests" / "model", root / "tests" / "distributed")
    source = "".join(path.read_text() for folder in folders for path in folder.glob("test_*.py"))
    missing = {name for name in named if f"def {name}(" not in source}
    assert len(named) > 20
    assert not missing
