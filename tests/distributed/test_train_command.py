"""``graphmoe train`` under torchrun: two processes take the steps of one, by DDP, FSDP2 and ZeRO; one writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("trl")

from graphmoe_cli.app import app
from tests.distributed import train_command_worker
from tests.distributed.launch import ROOT, WorkersFailed, launch
from tests.model import training_runs
from tests.model.training_runs import SMALL

pytestmark = pytest.mark.distributed

STEPS, BOUND = 10, 1e-5
SETTINGS = {"max_steps": STEPS, "save_steps": 5, "router_aux_loss_coef": 0.1, "lora_dropout": 0.0, "use_cpu": False}
WAYS = {
    **{"ddp": [], "ddp by accelerate launch": [], "fsdp2": ["--fsdp"], "fsdp2 by accelerate launch": ["--fsdp"]},
    **{"zero2": ["--deepspeed", "zero2.json"], "zero3": ["--deepspeed", "zero3.json"]},
}
ACCELERATE = ["--config_file", str(ROOT / "docs" / "configs" / "ddp.yaml"), "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("train")
    training_runs.make_base(root / "base")
    training_runs.write_questions(root / "questions.jsonl", 100)
    training_runs.write_questions(root / "held_out.jsonl", 8, seed=1)
    (root / "small.yaml").write_text(yaml.safe_dump({**SMALL, **SETTINGS}), encoding="utf-8")
    return root


def words(root: Path, output: str, *more: str) -> list[str]:
    given = ["train", "--config", root / "small.yaml", "--model", root / "base", "--data", root / "questions.jsonl"]
    given += ["--eval-data", root / "held_out.jsonl", "--output", root / output]
    return [*map(str, given), *more]


@pytest.fixture(scope="module")
def alone(root) -> Path:
    """The folder of one process."""
    with pytest.raises(SystemExit) as end:
        app(words(root, "alone"), prog_name="graphmoe")
    assert end.value.code == 0
    return root / "alone"


def logged(folder: Path) -> dict[str, list[float]]:
    """What one run logged, by name."""
    history: list[dict[str, Any]] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))[
        "log_history"
    ]
    names = ("loss", "aux_loss", "eval_loss", "expert_load_max/round_1")
    return {name: [log[name] for log in history if name in log] for name in names}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_take_the_steps_of_one(way, root, alone):
    """The same command: losses, router losses and loads of ten steps, evaluations, and the adapter that is saved."""
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")
    more = [str(ROOT / "docs" / "configs" / word) if word.endswith(".json") else word for word in WAYS[way]]
    accelerate = ACCELERATE if "accelerate" in way else []
    sharded = not way.startswith("ddp")
    ranks = launch(train_command_worker.command, words(root, way, *more), sharded, timeout=120, accelerate=accelerate)
    assert [status for status, _, _ in ranks] == [0, 0], ranks[0][2][-3000:] + ranks[1][2][-3000:]
    assert "step 1/10" in ranks[0][1]
    assert "step" not in ranks[1][1], "the second process printed"
    one, two = logged(alone), logged(root / way)
    assert len(one["loss"]) == STEPS
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=BOUND), name
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (alone, root / way))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (tensor - found[name]).abs().max() <= 100 * BOUND * tensor.abs().max().clamp(min=1e-3), name
    saved = json.loads((root / way / "train_result.json").read_text(encoding="utf-8"))
    assert saved["conditions"]["processes"] == 2
    assert (
        saved["trainable_parameters"] == json.loads((alone / "train_result.json").read_text())["trainable_parameters"]
    )


@pytest.mark.parametrize("way", [way for way in WAYS if "accelerate" not in way])
def test_two_processes_that_were_killed_end_as_two_that_were_not(way, root):
    """Killed in the eighth step of ten, after the checkpoint of the fifth: the adapter is the same to the bit."""
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")
    more = [str(ROOT / "docs" / "configs" / word) if word.endswith(".json") else word for word in WAYS[way]]
    given = words(root, f"{way}-killed", *more)
    with pytest.raises(WorkersFailed, match=r"SIGKILL|exitcode *: -9"):
        launch(train_command_worker.command, given, way != "ddp", 8, timeout=120)
    assert not (root / f"{way}-killed" / "adapter_model.safetensors").exists()
    ranks = launch(train_command_worker.command, [*given, "--resume"], way != "ddp", timeout=120)
    assert [status for status, _, _ in ranks] == [0, 0], ranks[0][2][-3000:] + ranks[1][2][-3000:]
    assert "goes on from checkpoint-5" in ranks[0][1]
    if not (root / way).exists():
        launch(train_command_worker.command, words(root, way, *more), way != "ddp", timeout=120)
    one, two = (load_file(root / name / "adapter_model.safetensors") for name in (way, f"{way}-killed"))
    assert one.keys() == two.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, two[name])] == []
    assert logged(root / way) == logged(root / f"{way}-killed")


def test_what_both_refuse_is_said_once(root):
    """And neither waits for the other."""
    ranks = launch(train_command_worker.command, words(root, "refused", "--batch", "3"), False, timeout=60)
    assert [status for status, _, _ in ranks] == [2, 2]
    assert "must be a multiple of their number, 2, got 3" in ranks[0][2]
    assert "graphmoe train" not in ranks[1][2]


def test_sharding_without_a_gpu_is_refused(root):
    """Accelerate would turn it into plain DDP without a word."""
    ranks = launch(train_command_worker.command, words(root, "no_gpu", "--fsdp"), False, timeout=60)
    assert [status for status, _, _ in ranks] == [2, 2]
    assert "--fsdp needs a GPU for each process" in ranks[0][2]
