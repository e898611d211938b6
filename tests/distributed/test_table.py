"""The table of docs/distributed.md at two processes: each trainer under each way to shard is one process in result.

The files of docs/configs start them; but for the precision, as equality is asked for in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

pytest.importorskip("trl")

from tests.distributed import trainer_worker
from tests.distributed.launch import ROOT, launch
from tests.distributed.trainer_worker import with_adapter
from tests.model.tiny_models import tiny_model

pytestmark = pytest.mark.distributed

TRAINERS = list(trainer_worker.TRAINERS)
SHARDED = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with the base model in it, for every run of this module."""
    folder = tmp_path_factory.mktemp("table")
    tiny_model().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module", params=SHARDED)
def sharded(request, root) -> tuple[str, list[dict[str, Any]]]:
    """All trainers at two processes by a file of docs/configs: its name, and what came back by rank."""
    name: str = request.param
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    ranks = launch(
        trainer_worker.train_each,
        *(TRAINERS, str(root / "base"), str(root / name), {}),
        accelerate=["--config_file", str(ROOT / f"docs/configs/{name}.yaml"), "--mixed_precision", "no"],
        timeout=240,
    )
    return name, ranks


@pytest.fixture(scope="module")
def one(root) -> dict[str, Any]:
    """All trainers here."""
    return trainer_worker.train_each(TRAINERS, str(root / "base"), str(root / "one"), {})


def adapter(root: Path, name: str, trainer: str) -> dict[str, torch.Tensor]:
    return load_file(root / name / trainer / "adapter_model.safetensors")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_one_process(root, one, trainer):
    """Every tensor of the adapter moves, by more than what counts as equal below."""
    trained, started = adapter(root, "one", trainer), get_peft_model_state_dict(with_adapter(tiny_model()))
    assert trained.keys() == started.keys()
    assert not [name for name, value in trained.items() if (value - started[name]).abs().max() < 2e-5]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_are_one(root, one, sharded, trainer):
    """Two steps over the same rows, of unequal length: the saved adapter and the losses are one process's."""
    name, ranks = sharded
    torch.testing.assert_close(adapter(root, name, trainer), adapter(root, "one", trainer), rtol=0, atol=1e-5)
    for rank in ranks:
        assert rank[trainer]["losses"] == pytest.approx(one[trainer]["losses"], abs=1e-5)


MADE_OF = {
    "ddp": ("DistributedDataParallel", 0, None),
    "fsdp2": ("FSDPPeftModelForCausalLM", 5, None),  # two layers, embeddings, norm with head, the rest
    "zero2": ("DeepSpeedEngine", 0, 2),
    "zero3": ("DeepSpeedEngine", 0, 3),
}


def test_the_runs_were_sharded(one, sharded):
    """accelerate trains without a word in another way than it was asked to where it finds no GPU."""
    name, ranks = sharded
    for trainer, held in (pair for rank in ranks for pair in rank.items()):
        assert (held["wrapper"], held["fsdp units"], held["zero stage"]) == MADE_OF[name]
        share = held["base weights"] / one[trainer]["base weights"]
        assert share == pytest.approx(1.0 if name in ("ddp", "zero2") else 0.5, abs=0.1)
