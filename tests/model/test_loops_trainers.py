"""The table of docs/training.md: every trainer under every setting trains, or says why not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

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


def check_same_gradients(found: Outcome, expected: Outcome, bound: float = 1e-6) -> None:
    """Of the first step, where both have the same weights; relative to each parameter's norm."""
    (a, *_), (b, *_) = found.gradients, expected.gradients
    assert a.keys() == b.keys()
    floor = 1e-6 * max(gradient.norm() for gradient in b.values())
    off = {n: ((a[n] - g).norm() / g.norm().clamp(min=floor)).item() for n, g in b.items()}
    assert max(off.values()) <= bound, {name: error for name, error in off.items() if error > bound}
    assert all(g.any() for name, g in b.items() if "router" in name)


# --- plain and checkpointed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BY_DEFAULT)
def test_checkpointing(kind, tmp_path):
    """The trainer at its defaults (TRL checkpoints, in bf16), and the gradients of a run without checkpointing."""
    plain = trained(kind, tmp_path, gradient_checkpointing=False)
    check_trained(plain, KINDS[kind].logs)
    defaults = {"gradient_checkpointing": True} if kind == "Trainer" else {}
    checkpointed = trained(kind, tmp_path, **defaults)
    assert checkpointed.trainer.args.gradient_checkpointing
    check_trained(checkpointed, KINDS[kind].logs)
    check_same_gradients(checkpointed, plain)
