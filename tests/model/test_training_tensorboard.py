"""What TensorBoard is told, where it is installed; `make test-integrations` runs this with it."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("trl")

from tests.model import training_runs


def test_losses_and_the_load_of_each_round_are_reported(tmp_path):
    """By default, as it is installed: nobody has to name it."""
    base = training_runs.make_base(tmp_path)
    training_runs.trained(base, tmp_path / "out", report_to="auto")
    (events,) = (tmp_path / "out" / "runs").iterdir()
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(events))
    found.Reload()
    for tag in ("train/loss", "train/aux_loss", "train/expert_load_max/round_1", "train/expert_load_max/round_2"):
        assert [event.step for event in found.Scalars(tag)] == [1, 2], tag
