"""Trainer's own saves under each strategy: checkpoints, the best one, the final one and a resumed run."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from tests.distributed import saving_trainer_worker
from tests.distributed.launch import launch
from tests.model.tiny_models import tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=saving_trainer_worker.STRATEGIES)
def run(request, tmp_path_factory):
    """The strategy, its folder, and what each rank found."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install deepspeed")
    folder = tmp_path_factory.mktemp("run")
    return request.param, folder, launch(saving_trainer_worker.save_and_resume, request.param, str(folder), timeout=240)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_save_is_the_adapter_of_its_step(run):
    """On disk and after load_best_model_at_end; with FSDP's activation_checkpointing nothing was in the files."""
    strategy, folder, ranks = run
    for rank in ranks:
        best = int(rank["best"].removeprefix("checkpoint-"))
        assert rank["shards"] == (strategy.startswith("fsdp2") or strategy == "zero3")
        assert_same(rank["after best"], rank["straight"][best])
        assert_same(rank["by hand"], rank["after best"])  # gathered by Accelerate, as refusals say
        if strategy == "fsdp2 sharded":  # no adapter is in its checkpoints: docs/distributed.md says what is
            assert rank["final"] is None
            assert set(rank["checkpoints"].values()) == {None}
            assert_same(rank["gathered"], rank["after best"])
            continue
        assert_same(rank["final"], rank["after best"])
        for step, saved in rank["checkpoints"].items():
            assert_same(saved, rank["straight"][step])
    PeftModel.from_pretrained(tiny_model(), folder / ("gathered" if strategy == "fsdp2 sharded" else "final"))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(run):
    """From the second of three steps: the adapter that it starts with and the one that it ends with."""
    _, _, ranks = run
    for rank in ranks:
        assert sorted(rank["resumed"]) == [2, 3]
        for step, adapter in rank["resumed"].items():
            assert_same(adapter, rank["straight"][step])
