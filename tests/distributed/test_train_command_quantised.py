"""``graphmoe train`` over 4-bit and 8-bit bases under torchrun: two processes take the steps of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

from graphmoe_cli.app import app
from tests.distributed import train_command_worker
from tests.distributed.launch import ROOT, launch
from tests.model import training_runs
from tests.model.training_runs import SMALL

pytestmark = pytest.mark.distributed

STEPS, BOUND = 5, 1e-5
SETTINGS = {"max_steps": STEPS, "save_steps": 5, "router_aux_loss_coef": 0.1, "lora_dropout": 0.0, "use_cpu": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("train")
    training_runs.make_base(root / "base")
    training_runs.write_questions(root / "questions.jsonl", 100)
    (root / "small.yaml").write_text(yaml.safe_dump({**SMALL, **SETTINGS}), encoding="utf-8")
    return root


def words(root: Path, output: str, *more: str) -> list[str]:
    given = ["train", "--config", root / "small.yaml", "--model", root / "base", "--data", root / "questions.jsonl"]
    return [*map(str, [*given, "--output", root / output]), *more]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [log["loss"] for log in history if "loss" in log]


# FSDP2 splits floating dtypes only, so 8 bits under it are refused (tests/cli/test_at_once.py).
@pytest.mark.parametrize(
    "bits, way",
    [*((4, way) for way in ("ddp", "fsdp2", "zero2", "zero3")), *((8, way) for way in ("ddp", "zero2", "zero3"))],
)
def test_two_processes_take_the_steps_of_one_over_a_quantised_base(bits, way, root):
    alone = root / f"alone-{bits}"
    if not alone.exists():
        with pytest.raises(SystemExit) as end:
            app(words(root, alone.name, f"--load-in-{bits}bit"), prog_name="graphmoe")
        assert end.value.code == 0
    more = {"ddp": [], "fsdp2": ["--fsdp"]}.get(way, ["--deepspeed", str(ROOT / "docs" / "configs" / f"{way}.json")])
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")
    given = words(root, f"{way}-{bits}", f"--load-in-{bits}bit", *more)
    ranks = launch(train_command_worker.command, given, way != "ddp", timeout=120)
    assert [status for status, _, _ in ranks] == [0, 0], ranks[0][2][-3000:] + ranks[1][2][-3000:]
    one, two = losses(alone), losses(root / f"{way}-{bits}")
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=BOUND)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (alone, root / f"{way}-{bits}"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (tensor - found[name]).abs().max() <= 100 * BOUND * tensor.abs().max().clamp(min=1e-3), name
