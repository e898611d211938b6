"""What `train` refuses, and that it does so before hours, or a base model's loading, are spent."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

pytest.importorskip("trl")

from graphmoe_model.base_models import loading
from graphmoe_model.questions import Question
from graphmoe_model.training import models, run_folder, train
from tests.model import training_runs
from tests.model.training_runs import recipe, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return training_runs.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Loading the base model fails the test: refusals come before it."""
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))


def test_a_disk_that_is_full(base, tmp_path, monkeypatch, no_model):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: Usage(1, 1, 1000))
    with pytest.raises(
        ValueError, match=r"has 0.0 GB free, and this run writes up to .* trained parameters, 3 checkpo"
    ):
        trained(base, tmp_path / "out")


def test_the_room_that_is_asked_for_is_what_a_run_takes(base, tmp_path):
    """An upper bound, and no wild one: the files of kept checkpoints but for a few kilobytes of each."""
    result = trained(base, tmp_path / "out", max_steps=4, r=64, lora_alpha=64)
    run = recipe(base, tmp_path / "out", r=64)
    needed = run_folder.check_space(run, result.trainable_parameters)
    size = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.suffix in (".safetensors", ".pt"))
    one = 4 * result.trainable_parameters
    assert size > 7 * one  # two checkpoints of three, and the adapter
    assert needed == 10 * one  # one checkpoint more, while it is written
    assert size < needed


def test_a_folder_of_something_else(base, tmp_path, no_model):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\) and no run; name a new or an empty folder"):
        trained(base, tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt is a file; name a folder"):
        trained(base, tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"cannot be written to: Not a directory"):
        trained(base, tmp_path / "notes.txt" / "out")


def test_a_folder_with_the_same_run_or_another(base, tmp_path, monkeypatch):
    trained(base, tmp_path / "out")
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="holds a run of this same recipe; go on with it by --resume, or name another"):
        trained(base, tmp_path / "out")
    with pytest.raises(ValueError, match=r"a run of another recipe: r \(--r\) was 2 and is 4. Name another folder"):
        trained(base, tmp_path / "out", r=4)


def test_questions_that_cannot_be_trained_on(base, tmp_path, no_model):
    run = recipe(base, tmp_path / "out")
    with pytest.raises(ValueError, match="there are no questions"):
        train(run, [])
    unknown = Question("is it", ("a", "b"), 0, labels=("hot stone", "cold"))
    with pytest.raises(ValueError, match="'hot stone' is not one token"):
        train(run, [unknown])


@pytest.mark.parametrize("option, package", [("load_in_4bit", "bitsandbytes"), ("deepspeed", "deepspeed")])
def test_a_missing_package_is_named_with_what_installs_it(option, package, base, tmp_path, monkeypatch, no_model):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    value = "zero2.json" if option == "deepspeed" else True
    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'graphmoe\["):
        trained(base, tmp_path / "out", use_cpu=False, **{option: value})


def test_a_batch_that_processes_cannot_share(base, tmp_path, monkeypatch, no_model):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"batch \(--batch\) is the rows of all processes together .* 3, got 4"):
        trained(base, tmp_path / "out")


def test_one_process_is_not_sharded(base, tmp_path, no_model):
    with pytest.raises(
        ValueError, match=r"start several, torchrun --nproc_per_node 2 -m graphmoe_cli train \.\.\. --fsdp$"
    ):
        trained(base, tmp_path / "out", fsdp=True, use_cpu=False)


@pytest.mark.parametrize("asked, option", [("FSDP", "--fsdp"), ("DEEPSPEED", "--deepspeed FILE")])
def test_what_accelerate_was_configured_for_is_in_the_recipe(asked, option, base, tmp_path, monkeypatch, no_model):
    """Else the run would be split, and what is saved with it would say that it was not."""
    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    with pytest.raises(ValueError, match=f"configured for {asked}, which the recipe does not say: pass {option}"):
        trained(base, tmp_path / "out", use_cpu=False)


def test_a_deepspeed_file_that_is_none(base, tmp_path, monkeypatch, no_model):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(
        ValueError, match=rf"--deepspeed nowhere\.json: there is no such file .* as {Path.cwd()}/nowhere\.json"
    ):
        trained(base, tmp_path / "out", deepspeed="nowhere.json", use_cpu=False)


def test_a_model_that_is_none(tmp_path, base):
    with pytest.raises(ValueError, match=r"there is no folder \./nowhere"):
        trained(Path("./nowhere"), tmp_path / "out", model="./nowhere")
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot load the model .*: Error while deserializing header"):
        trained(tmp_path / "base", tmp_path / "out")


def test_a_loss_that_is_no_number_ends_the_run(base, tmp_path):
    with pytest.raises(ValueError, match=r"the loss is nan at step \d, so training was stopped; .*--learning-rate"):
        trained(base, tmp_path / "out", max_steps=6, learning_rate=1.0, weight_decay=0.0, max_grad_norm=0.0,
                scheduler="constant", lora_alpha=10**20)  # fmt: skip
