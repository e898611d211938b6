"""`make study`: it goes on where it stopped, mixes no settings, works alone."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("lm_eval")

from experiments.study import runner
from experiments.study.plan import run_of, slots
from experiments.study.results import Results, StudyError, alone, runs_of
from experiments.study.runner import dry_run, go_through
from experiments.study.settings import Part, Run
from graphmoe_model.analysis import one_run
from graphmoe_model.training import DivergedError
from graphmoe_model.training import trainer as training_trainer
from graphmoe_model.training.callbacks import duration
from tests.experiments.made_up import PLAIN, document, part, small

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def go(own: Part, folder: Path, **options) -> list[str]:
    """Run what is missing; the lines that it says."""
    said: list[str] = []
    options = {"budget": None, "only": (), **options}
    go_through(own, folder / "results", folder / "work", say=said.append, **options)
    return said


def killed_in(child) -> None:
    """Run ``child`` in a fork, which has to be killed by what it does."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def contents(folder: Path) -> dict[str, dict]:
    """Results by file, without what differs between two runs of one thing."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}
    for result in found.values():
        del result["seconds"], result["conditions"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a study that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    go(small(), folder)
    return folder


def test_every_planned_run_leaves_a_result_with_its_conditions_and_nothing_else(whole):
    results = Results(small(), whole / "results")
    assert len(results) == 1 + 2 * 2 + 2
    for result in results.all():
        assert result["diverged"] is None
        assert {"device", "threads", "versions", "commit", "created_at"} <= set(result["conditions"])
        assert sum(map(len, result["right"]["test"].values())) == 9
        trained = result["settings"]["method"] != "untouched"
        assert (result["trainable_parameters"] > 0) == trained
        if trained:
            assert len(result["load_variation"]) == result["settings"]["adapter"]["rounds"]
            assert result["seconds"]["per_step"] > 0
    assert [path.name for path in (whole / "work").iterdir()] == ["base"], "adapters are removed with their results"


def test_finished_runs_are_skipped(whole):
    before = {path: path.stat().st_mtime_ns for path in (whole / "results").glob("*.json")}
    assert go(small(), whole) == ["made_up: 0 runs done now, 0 missing"]
    assert {path: path.stat().st_mtime_ns for path in (whole / "results").glob("*.json")} == before


@FORKS
def test_a_study_killed_between_runs_and_inside_one_ends_as_one_that_was_not(whole, tmp_path, monkeypatch):
    """Killed before the third result is written, and then while the second checkpoint of the fourth run is saved."""
    calls: list[int] = []
    add = Results.add

    def third(self, run, document):
        calls.append(1)
        if len(calls) == 3:
            die()
        add(self, run, document)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", third)
        killed_in(lambda: go(small(), tmp_path))
    assert len(contents(tmp_path)) == 2
    complete = training_trainer.complete

    def second(checkpoint):
        calls.append(1)
        if len(calls) == 2:
            die()
        complete(checkpoint)

    run = run_of(slots(small())[3], Results(small(), tmp_path / "results"))
    with monkeypatch.context() as patch:
        patch.setattr(training_trainer, "complete", second)
        killed_in(lambda: go(small(), tmp_path, only=("graphmoe",)))
    assert list((tmp_path / "work").glob("*graphmoe*/checkpoint-2")), "the fork was killed inside a run"
    said = go(small(), tmp_path)
    assert any("goes on from checkpoint-2" in line for line in said)
    assert isinstance(run, Run)
    assert contents(tmp_path) == contents(whole)


def test_changed_settings_are_refused_with_the_file_and_what_changed(whole):
    changed = small(steps=6)
    with pytest.raises(StudyError, match=r"one\..*\.json was made with other settings.*recipe\.max_steps 4, not 6"):
        go(changed, whole)
    with pytest.raises(StudyError, match=r"recipe\.max_steps 4, not 6"):
        dry_run(changed, whole / "results", whole / "work", only=(), say=print)


def test_results_of_runs_that_the_table_no_longer_has_are_refused(whole):
    fewer = small(methods=small().methods[:2])
    with pytest.raises(StudyError, match=r"graphmoe.*is of no run of the part made_up"):
        go(fewer, whole)


def test_more_seeds_add_runs_and_change_none(whole):
    more = small(seeds=(3, 4, 5))
    assert len(Results(more, whole / "results")) == 7


def test_a_result_that_is_no_json_is_named(tmp_path):
    run = runs_of(small())[0]
    (tmp_path / f"{run.name}.json").write_text('{"settings"')
    with pytest.raises(StudyError, match=rf"{run.name}.json is not JSON.*remove it"):
        Results(small(), tmp_path)


@FORKS
def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    with alone(tmp_path / "results", ["one.mixlora"]):
        pid = os.fork()
        if pid == 0:
            try:
                go(small(), tmp_path)
            except StudyError as error:
                os._exit(0 if f"process {os.getppid()}" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def held() -> None:
        with alone(tmp_path / "results", ["one.mixlora", "three.mixlora"]):
            die()

    killed_in(held)
    with alone(tmp_path / "results", ["one.mixlora"]), alone(tmp_path / "results", ["one.graphmoe"]):
        pass  # two processes share a part


def test_a_process_takes_what_it_was_told_alone(tmp_path):
    own = part()
    with alone(tmp_path / "results", ["one.mixlora"]):
        for only in (("three",), ("one", "graphmoe")):
            assert go(own, tmp_path, only=only, budget=0.1)[-1].startswith("made_up: 0 runs done now")
        for only in (("one",), ("mixlora",), ()):
            with pytest.raises(StudyError, match=r"the results of one.mixlora in .* are in use by process"):
                go(own, tmp_path, only=only, budget=0.1)


def test_a_run_that_diverges_is_a_result_and_the_study_goes_on(tmp_path, monkeypatch):
    def diverges(*_, **__):
        raise DivergedError("the loss is nan at step 1")

    monkeypatch.setattr(one_run, "train", diverges)
    go(small(), tmp_path, only=("mixlora",))
    results = Results(small(), tmp_path / "results")
    assert [result["diverged"] for result in results.all()] == ["the loss is nan at step 1"] * 2


def test_a_dry_run_says_what_is_done_begun_and_missing_and_writes_nothing(tmp_path):
    own = small()
    results = Results(own, tmp_path / "results")
    done = Run(own, "one", own.method("mixlora"), PLAIN[0], 3)
    results.add(done, document(done))
    begun = Run(own, "one", own.method("mixlora"), PLAIN[1], 3)
    runner.run_folder(begun, tmp_path / "work").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    said: list[str] = []
    dry_run(own, tmp_path / "results", tmp_path / "work", only=(), say=said.append)
    assert len(said) == len(slots(own)) + 1
    assert said[1].endswith("done")
    assert said[3].endswith("begun")
    assert "at the rate that is best on validation" in said[5]
    # by the table 7 s of loading and seconds per step, of 4 steps and 1 for each split; mixlora as the one that is done
    expected = (7 + 2 * 0.5) + 2 * 11 + 2 * (7 + (4 + 2) * 2) + (7 + (4 + 1) * 2)
    assert said[-1] == f"made_up: 6 runs missing, about {duration(expected)}"
    assert sorted(tmp_path.rglob("*")) == before


def test_no_run_begins_that_would_not_end_within_the_budget(tmp_path):
    said = go(small(), tmp_path, budget=0.5)
    assert not list((tmp_path / "results").glob("*.json"))
    assert "one.untouched.seed3 would take about 8 s" in said[0]
    assert said[-1] == "made_up: 0 runs done now, 7 missing"


def test_unknown_names_list_those_there_are(tmp_path):
    with pytest.raises(StudyError, match=r"--only lora:.*it has one, three, untouched, mixlora, graphmoe"):
        go(part(), tmp_path, only=("lora",))
