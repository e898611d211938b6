"""Runs that are killed at any moment, also while they write, and gone on with: the adapter of one that was not."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from graphmoe_model.training import run as training_run
from graphmoe_model.training import run_folder, train, trainer
from graphmoe_tables.recipe import TrainingRecipe
from tests.model import training_runs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

SETTINGS = {"max_steps": 6, "save_steps": 2, "keep_checkpoints": 1, "eval_data": ("made up",), "warmup": 0.2}
QUESTIONS, HELD_OUT = training_runs.make_questions(30), training_runs.make_questions(6, seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return training_runs.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train(recipe(base, folder), QUESTIONS, HELD_OUT, say=lambda line: None)
    return folder


def recipe(base: Path, folder: Path, **changes: Any) -> TrainingRecipe:
    return training_runs.recipe(base, folder, **{**SETTINGS, **changes})


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def on_call(owner: Any, name: str, number: int, *, after: bool = False) -> Callable[[], None]:
    """Make what has this process killed at the call of this number, before it or after it."""

    def arm() -> None:
        original, calls = getattr(owner, name), []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == number and not after:
                die()
            result = original(*args, **kwargs)
            if len(calls) == number:
                die()
            return result

        setattr(owner, name, counted)

    return arm


def half_of(file: str, step: int) -> Callable[[], None]:
    """Make what has this process killed when half of a checkpoint's file is written."""

    def arm() -> None:
        from transformers import trainer as transformers_trainer

        original = transformers_trainer.torch.save

        def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            original(value, path, *args, **kwargs)
            if str(path).endswith(f"checkpoint-{step}/{file}"):
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        transformers_trainer.torch.save = save

    return arm


SAVE = trainer.RecipeTrainer
MOMENTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": on_call(SAVE, "training_step", 2),
    "in the middle of step 4": on_call(SAVE, "training_step", 8),
    "in the first checkpoint, before the adapter": on_call(SAVE, "save_model", 1),
    "in a checkpoint, after the adapter": on_call(SAVE, "save_model", 2, after=True),
    "in a checkpoint, in the optimizer's file": half_of("optimizer.pt", 4),
    "in a checkpoint, before the random state": on_call(SAVE, "_save_rng_state", 2),
    "in a checkpoint, before it is marked as whole": on_call(trainer, "complete", 2),
    "before an old checkpoint is removed": on_call(trainer, "rotate", 2),
    "while an old checkpoint is removed": on_call(run_folder.shutil, "rmtree", 1),
    "after the last step, before the adapter": on_call(SAVE, "save_model", 4),
    "after the adapter, before the result": on_call(training_run, "write_result", 1),
}

# One of each kind at every run of the tests, all of them in the long sweeps.
QUICK = (
    "in the middle of step 4",
    "in a checkpoint, in the optimizer's file",
    "after the last step, before the adapter",
)


def killed(arm: Callable[[], None], run: Callable[[], Any]) -> None:
    """Run in a process of its own that is killed on its way."""
    process = os.fork()
    if process == 0:
        try:
            arm()
            run()
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "the run ended before the moment came"


@pytest.mark.parametrize("moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_a_killed_run_ends_as_one_that_was_not(moment, base, whole, tmp_path):
    """Bit for bit: weights, what was logged of the experts' load, the best loss."""
    folder, lines = tmp_path / "out", []
    run = recipe(base, folder)
    killed(MOMENTS[moment], lambda: train(run, QUESTIONS, HELD_OUT, say=lambda line: None))
    result = train(run, QUESTIONS, HELD_OUT, resume=True, say=lines.append)
    for name in ("adapter_model.safetensors", "expert_load.jsonl", "data.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    expected = run_folder_result(whole)
    assert (result.steps, result.eval_loss, result.best_step) == (6, expected.eval_loss, expected.best_step)
    in_part = any("is not whole" in line for line in lines)
    assert in_part == (
        moment.startswith(("in a checkpoint", "in the first", "while")) and "before the adapter" not in moment
    )
    assert any("goes on from checkpoint-" in line or "starts anew" in line for line in lines)
    assert all(run_folder.is_whole(checkpoint) for checkpoint in run_folder.checkpoints(folder))


def run_folder_result(folder: Path) -> Any:
    found = training_run.read_result(folder)
    assert found is not None
    return found


@pytest.mark.slow
def test_killed_again_and_again(base, whole, tmp_path):
    """Each time after a few steps; a resumed run can be resumed."""
    run = recipe(base, tmp_path / "out")
    for _ in range(2):
        killed(on_call(SAVE, "training_step", 5), lambda: train(run, QUESTIONS, HELD_OUT, resume=True, say=len))
    train(run, QUESTIONS, HELD_OUT, resume=True, say=len)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_is_left_alone(base, whole, tmp_path):
    """A job that is queued again does not train again."""
    shutil.copytree(whole, tmp_path / "out")
    lines: list[str] = []
    before = (tmp_path / "out" / "train_result.json").stat().st_mtime_ns
    result = train(recipe(base, tmp_path / "out"), QUESTIONS, HELD_OUT, resume=True, say=lines.append)
    assert result == run_folder_result(whole)
    assert "finished" in lines[0]
    assert (tmp_path / "out" / "train_result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("changes, named", [
    ({"learning_rate": 0.02}, r"learning_rate \(--learning-rate\) was 0.01 and is 0.02"),
    ({"seed": 1, "batch": 2}, r"batch \(--batch\) was 4 and is 2; seed \(--seed\) was 0 and is 1"),
])  # fmt: skip
def test_another_recipe_is_refused(changes, named, base, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(ValueError, match=f"holds a run of another recipe: {named}.*--resume"):
        train(recipe(base, tmp_path / "out", **changes), QUESTIONS, HELD_OUT, resume=True)


@pytest.mark.parametrize("finished", [True, False])
def test_other_questions_are_refused(finished, base, whole, tmp_path):
    """The recipe names a file; what is in it may have changed. A finished run has not finished it for those."""
    shutil.copytree(whole, tmp_path / "out")
    if not finished:
        (tmp_path / "out" / "train_result.json").unlink()
    with pytest.raises(
        ValueError, match="holds a run on other questions: what --data or --eval-data names has changed"
    ):
        train(recipe(base, tmp_path / "out"), QUESTIONS[1:], HELD_OUT, resume=True)


def test_what_changes_nothing_may_differ(base, tmp_path):
    run = recipe(base, tmp_path / "out")
    killed(on_call(SAVE, "training_step", 8), lambda: train(run, QUESTIONS, HELD_OUT, say=len))
    result = train(recipe(base, tmp_path / "out", keep_checkpoints=2), QUESTIONS, HELD_OUT, resume=True, say=len)
    assert (result.steps, result.resumed_from) == (6, 2)
