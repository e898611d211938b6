"""Trainer and SFTTrainer at two processes against one: the global load-balance loss, and the local one as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import balance_trainers_worker
from tests.distributed.balance_trainers_worker import Run, train
from tests.distributed.launch import ROOT, launch
from tests.model.training import trained_model

pytestmark = pytest.mark.distributed

BOUND = 1e-5  # fp32
APART = {"average_tokens_across_devices": False}
# Two processes end where one with the same global micro-batches does, accumulated by two.
AS_ONE = {
    "Trainer": Run(),
    "Trainer, checkpointing": Run(checkpointing=True),
    # each process divides by its own labels, which is one process's loss only if they have as many
    "Trainer, each process by its own labels": Run(rows="as many labels", arguments=APART),
    "SFTTrainer": Run(sft=True),
    "Trainer, local, alike rows": Run(rows="alike", scope="local"),
}
LOCAL = {"Trainer": Run(scope="local"), "SFTTrainer": Run(sft=True, scope="local")}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    runs = {**AS_ONE, **{f"local: {name}": run for name, run in LOCAL.items()}}
    return launch(balance_trainers_worker.run_all, runs, timeout=240)


def difference(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> float:
    """The largest |a - b| / |b|."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_are_one(ranks, name):
    """The router's gradients, the parameters after two steps of AdamW, and what is logged."""
    results, expected = [rank[name] for rank in ranks], train(AS_ONE[name])
    for own in results:
        assert difference(own["gradients"], expected["gradients"]) < BOUND
        assert difference(own["parameters"], expected["parameters"]) < 10 * BOUND  # AdamW divides by small numbers
    assert results[0]["loss"] == pytest.approx(expected["loss"], rel=BOUND)
    assert results[0]["aux_loss"] == pytest.approx(expected["aux_loss"], rel=BOUND)


@pytest.mark.parametrize("name", LOCAL)
def test_by_default_each_process_balances_its_own_tokens(ranks, name):
    """As Transformers does; the comparison above can fail. All parameters train, and the ranks agree."""
    first, second = (rank[f"local: {name}"] for rank in ranks)
    assert difference(first["gradients"], train(LOCAL[name])["gradients"]) > 1e-3
    start = {n: p for n, p in trained_model(rounds=3).named_parameters() if p.requires_grad}
    assert first["parameters"].keys() == second["parameters"].keys() == start.keys()
    for parameter, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][parameter]), f"{parameter} differs between the ranks"
        assert not torch.equal(value, start[parameter]), f"{parameter} was not trained"


def run_program(program: Path, *launcher: str) -> float:
    """The number that a training prints at its end."""
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *launcher, str(program)]
    run = subprocess.run(command, cwd=program.parent, env=variables, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-4000:]
    return float(run.stdout.splitlines()[-1])


def test_the_program_in_the_docs(tmp_path):
    """Under torchrun and alone, as the text says: the same checksum."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    program = tmp_path / "train.py"
    program.write_text(text.partition("## Many processes")[2].partition("```python\n")[2].partition("```")[0])
    alone = run_program(program)
    together = run_program(program, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert together == pytest.approx(alone, rel=BOUND)
