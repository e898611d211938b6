"""Saves that fail or are killed at any step, that race with each other, and readers beside them.

The two adapters have the same shapes: a mixture of them can be told by nothing but the digest.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from graphmoe_model.checkpoints import folder as folder_module
from tests.model.adapter_folders import CONFIG, PICKLE, WEIGHTS, contents, loaded, two_models
from tests.model.tiny_models import logits, tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

MIXTURE = "holds the configuration of one save and the weights of another"


@pytest.fixture(scope="module")
def models() -> dict[str, PeftModel]:
    return two_models()


@pytest.fixture(scope="module")
def expected(models) -> dict[str, torch.Tensor]:
    return {name: logits(model) for name, model in models.items()}


def found(folder: Path, expected: dict[str, torch.Tensor]) -> str:
    """Which adapter a folder gives: 'one', 'two', or 'refused' with the error that names the mixture."""
    try:
        actual = loaded(folder)
    except ValueError as error:
        if MIXTURE in str(error) or "was saved again while it was being loaded" in str(error):
            return "refused"
        raise
    names = [name for name in expected if torch.equal(actual, expected[name])]
    assert names, "a mixture was loaded"
    return names[0]


class Step(Exception):
    """Raised or died at."""


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch, end) -> None:
    """Have the moves of a save call ``end`` in place of the step-th change to the folder, and go on from there."""
    taken = iter(range(1000))
    originals = {name: getattr(Path, name) for name in ("replace", "unlink")}

    def interrupted(name: str):
        def change(self: Path, *args, **kwargs):
            if self.suffix != ".stamped" and next(taken) == step:
                end()
            return originals[name](self, *args, **kwargs)

        return change

    for name in originals:
        monkeypatch.setattr(Path, name, interrupted(name))


def fail() -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("pickled", [False, True], ids=["same type", "other type"])
def test_a_failure_at_any_step_of_a_save_takes_everything_back(pickled, models, expected, tmp_path, monkeypatch):
    """Also after the weights were replaced, and where weights of the other file type have to go."""
    models["one"].save_pretrained(tmp_path, safe_serialization=not pickled)
    before = contents(tmp_path)
    steps = 4 if pickled else 3  # model card, weights, configuration, the old weights' removal
    for step in range(steps):
        with monkeypatch.context() as patch:
            interrupted_at(step, patch, fail)
            with pytest.raises(OSError, match="Input/output error"):
                models["two"].save_pretrained(tmp_path)
        assert contents(tmp_path) == before, step
    models["two"].save_pretrained(tmp_path)
    assert found(tmp_path, expected) == "two"
    assert set(contents(tmp_path)) == {"README.md", CONFIG, WEIGHTS}


@pytest.mark.parametrize("pickled", [False, True], ids=["same type", "other type"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_or_says_so(pickled, models, expected, tmp_path, monkeypatch):
    """Between the two renames neither is whole; the error then says where the rest of the new one is."""
    outcomes = []
    for step in range(4 if pickled else 3):
        folder = tmp_path / str(step)
        models["one"].save_pretrained(folder, safe_serialization=not pickled)
        child = os.fork()
        if child == 0:
            with monkeypatch.context() as patch:
                interrupted_at(step, patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
                models["two"].save_pretrained(folder)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        outcomes.append(found(folder, expected))
        if outcomes[-1] == "refused":
            finished = shutil.copytree(folder, tmp_path / "finished")
            with pytest.raises(ValueError, match=r"still in .*\.saving-.*adapter_config.json: move it") as error:
                loaded(finished)
            rest = str(error.value).partition("still in ")[2].partition(": move it")[0]
            shutil.move(rest, finished / CONFIG)
            assert found(finished, expected) == "two"
        models["one"].save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} == {"README.md", CONFIG, WEIGHTS}  # nothing of the killed save
        assert found(folder, expected) == "one"
    assert outcomes == ["one", "one", "refused", *(["two"] if pickled else [])]


def saver(folder: Path, models: dict[str, PeftModel], pause: float) -> int:
    """A process that saves one adapter after the other into the folder until it is killed."""
    child = os.fork()
    if child == 0:
        while True:
            for model in models.values():
                model.save_pretrained(folder)
                time.sleep(pause)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_random_times_never_leave_a_mixture_that_loads(kills, models, expected, tmp_path):
    draw = random.Random(0)
    outcomes = {"one": 0, "two": 0, "refused": 0}
    models["one"].save_pretrained(tmp_path)
    for _ in range(kills):
        child = saver(tmp_path, models, pause=0)
        time.sleep(draw.uniform(0.02, 0.12))
        kill(child)
        outcomes[found(tmp_path, expected)] += 1
        assert len(list(tmp_path.glob(".saving-*"))) <= 1 + outcomes["refused"]  # a save removes what it finds
    assert outcomes["refused"] < kills / 2
    models["two"].save_pretrained(tmp_path)
    assert found(tmp_path, expected) == "two"
    assert not list(tmp_path.glob(".saving-*"))


def test_a_reader_during_saves_gets_one_adapter_or_an_error(models, expected, tmp_path):
    models["one"].save_pretrained(tmp_path)
    child = saver(tmp_path, models, pause=0.05)
    try:
        outcomes = [found(tmp_path, expected) for _ in range(8)]
    finally:
        kill(child)
    assert len(outcomes) == 8


def test_a_save_between_configuration_and_weights_is_noticed(models, expected, tmp_path, monkeypatch):
    """The reader's race, made certain: the folder is saved again after its configuration was read."""
    from graphmoe_model import GraphMoEConfig

    models["one"].save_pretrained(tmp_path)
    read = GraphMoEConfig.from_pretrained.__func__

    def then_saved(cls, *args, **kwargs):
        config = read(cls, *args, **kwargs)
        models["two"].save_pretrained(tmp_path)
        return config

    monkeypatch.setattr(GraphMoEConfig, "from_pretrained", classmethod(then_saved))
    with pytest.raises(ValueError, match="was saved again while it was being loaded"):
        loaded(tmp_path)
    model = models["one"]
    with pytest.raises(ValueError, match="was saved again while it was being loaded"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    monkeypatch.undo()
    config = GraphMoEConfig.from_pretrained(str(tmp_path))
    models["one"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=MIXTURE):
        PeftModel.from_pretrained(tiny_model(), tmp_path, config=config)


def test_two_savers_in_one_folder_leave_one_of_their_adapters(models, expected, tmp_path):
    """Their moves wait for each other."""
    for _ in range(3):
        children = []
        for model in models.values():
            children.append(os.fork())
            if children[-1] == 0:
                for _ in range(6):
                    model.save_pretrained(tmp_path)
                os._exit(0)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
        assert found(tmp_path, expected) in ("one", "two")
    assert set(contents(tmp_path)) == {"README.md", CONFIG, WEIGHTS}


def test_a_failed_save_leaves_what_another_process_saved_meanwhile(models, expected, tmp_path):
    """It made the folder; that does not make the folder its own."""
    folder = tmp_path / "new"

    def write(temporary: Path) -> None:
        models["one"].save_pretrained(folder)
        fail()

    with pytest.raises(OSError, match="Input/output error"):
        folder_module.fill_folder(folder, write)
    assert found(folder, expected) == "one"
    with pytest.raises(OSError, match="Input/output error"):
        folder_module.fill_folder(tmp_path / "empty", lambda temporary: fail())
    assert not (tmp_path / "empty").exists()


def test_only_the_remains_of_dead_savers_are_removed(models, tmp_path):
    """A live save's folder is locked; one with another adapter's files may hold the rest of a killed save."""
    (tmp_path / ".saving-dead").mkdir()
    (tmp_path / ".saving-dead" / WEIGHTS).write_text("half")
    (tmp_path / ".saving-other" / "second").mkdir(parents=True)  # its weights are in place
    (tmp_path / ".saving-other" / "second" / CONFIG).write_text("{}")
    with folder_module.temporary_folder(tmp_path) as live:
        (live / PICKLE).write_text("half")
        models["one"].save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.glob(".saving-*")} == {live.name, ".saving-other"}
        assert folder_module.in_use(tmp_path)
