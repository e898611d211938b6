"""Sweeps: what is run, that it is run once whatever interrupts it, and what is told of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("lm_eval")

from graphmoe_model.analysis import one_run, sweeps
from graphmoe_model.analysis import sweep as sweep_module
from graphmoe_model.analysis.differences import differences
from graphmoe_model.analysis.one_process import alone
from graphmoe_model.analysis.sweep import (
    ADAPTERS,
    BASE,
    RUNS,
    run_name,
    run_sweep,
)
from graphmoe_model.analysis.sweep_report import document_of, results_of
from graphmoe_model.training import DivergedError, train
from graphmoe_tables.recipe import TrainingRecipe
from tests.model.small_sweeps import question_set, silent, started, sweep_of
from tests.model.training_runs import make_base, make_questions

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def test_settings_that_no_recipe_has_are_refused_before_anything_runs(base):
    plan = sweeps.activated(started(base), [2, 9])
    with pytest.raises(ValueError, match=r"top 9: .*top_k"):
        sweep_of(base, plan)
    for seeds in ((), (1, 1), tuple(range(11)), (0, -1), (0, 2**32)):
        with pytest.raises(ValueError, match="--seeds must be 1 to 10 different numbers of 0 to 4294967295, got"):
            sweep_of(base, seeds=seeds)
    with pytest.raises(ValueError, match="a sweep reports to no one, and the recipe has report_to: wandb"):
        sweep_of(base, recipe=started(base, report_to="wandb"))
    sweep_of(base, recipe=started(base, report_to="auto"))  # as recipe.yaml has it beside an adapter


def test_a_sweep_under_torchrun_is_refused(base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a sweep runs in one process"):
        sweep_of(base)


def test_a_sweep_runs_each_setting_with_each_seed_and_only_once(base, tmp_path):
    """Adapters are those of `graphmoe train`; checkpoints are gone; what is done is not run again."""
    sweep, said = sweep_of(base), []
    first = run_sweep(sweep, tmp_path, said.append)
    names = ["base", "t1.seed0", "t-2-gru-0.25.seed0", "t1.seed1", "t-2-gru-0.25.seed1"]
    assert [run_name(setting, seed) for setting, seed in sweep.runs()] == names
    assert sorted(path.stem for path in (tmp_path / RUNS).iterdir()) == sorted(names)
    assert len([line for line in said if line.startswith("run ")]) == 5
    adapters = sorted((tmp_path / ADAPTERS).iterdir())
    assert [path.name for path in adapters] == sorted(names[1:])
    assert not list((tmp_path / ADAPTERS).glob("*/checkpoint-*"))
    own = dataclasses.replace(sweep.recipe, rounds=2, seed=1, output=str(tmp_path / "alone"), report_to="none")
    train(own, make_questions(24), say=silent)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "alone" / weights).read_bytes() == (
        tmp_path / ADAPTERS / "t-2-gru-0.25.seed1" / weights
    ).read_bytes()
    again: list[str] = []
    assert run_sweep(sweep, tmp_path, again.append) == first
    assert again == []


def test_a_sweep_that_is_killed_goes_on(base, tmp_path, monkeypatch):
    """Between two runs and inside one: the results are those of a sweep that nothing interrupted."""
    plain = run_sweep(sweep_of(base), tmp_path / "plain", silent)

    class KilledError(BaseException):
        pass

    ends = {"after": 2}

    def killed(*args: Any, **kwargs: Any) -> Any:
        if ends["after"] == 0:
            raise KilledError
        ends["after"] -= 1
        return train(*args, **kwargs)

    monkeypatch.setattr(one_run, "train", killed)
    with pytest.raises(KilledError):
        run_sweep(sweep_of(base), tmp_path / "killed", silent)
    assert len(list((tmp_path / "killed" / RUNS).iterdir())) == 3
    monkeypatch.setattr(one_run, "train", train)
    begun = tmp_path / "killed" / ADAPTERS / "t1.seed1"
    half = dataclasses.replace(sweep_of(base).recipe, rounds=1, gru_hidden_scale=None, seed=1, output=str(begun))

    def stops(_: str) -> None:
        if list(begun.glob("checkpoint-1/complete.json")):
            raise KilledError

    with pytest.raises(KilledError):
        train(dataclasses.replace(half, report_to="none"), make_questions(24), say=stops)
    said: list[str] = []
    found = run_sweep(sweep_of(base), tmp_path / "killed", said.append)
    assert any("goes on from checkpoint-1" in line for line in said)
    assert {key: own["right"] for key, own in found.items()} == {key: own["right"] for key, own in plain.items()}


def test_a_folder_of_another_sweep_is_refused_with_both(base, tmp_path):
    run_sweep(sweep_of(base, sweeps.Plan(sweeps.sensitivity(started(base), [1], []).settings, ())), tmp_path, silent)
    with pytest.raises(
        ValueError, match=r"holds a sweep with seeds \[0, 1\], not \[0, 1, 2\]; settings\.t-2-gru-0\.25"
    ):
        run_sweep(sweep_of(base, seeds=(0, 1, 2)), tmp_path, silent)
    before = r"one\.jsonl \(7 questions, \w+\) and two\.jsonl \(5 questions, \w+\)"
    with pytest.raises(ValueError, match=rf"asked {before}, not one\.jsonl \(7 questions, \w+\)"):
        run_sweep(sweep_of(base, asked={"one": question_set("one", 7, 5)}), tmp_path, silent)
    with pytest.raises(ValueError, match=r"recipe\.logging_steps 1, not 2"):  # the load is a mean over what is logged
        run_sweep(sweep_of(base, recipe=started(base, logging_steps=2)), tmp_path, silent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex and no sweep; name a new folder"):
        run_sweep(sweep_of(base), tmp_path / "other", silent)
    with pytest.raises(ValueError, match="cannot be written to"):
        run_sweep(sweep_of(base), tmp_path / "other" / "thesis.tex" / "x", silent)


def test_another_base_model_in_the_same_folder_is_refused(tmp_path):
    """Half of the points would be another model's."""
    base = make_base(tmp_path / "base")
    sweep, said = sweep_of(base, seeds=(0,)), []
    run_sweep(sweep, tmp_path / "sweep", silent)
    weights = base / "model.safetensors"
    there = weights.read_bytes()
    weights.write_bytes(there[:-4] + b"abcd")
    with pytest.raises(ValueError, match=r"holds a sweep with base_files \w{12}, not \w{12}\. Name another folder"):
        run_sweep(sweep, tmp_path / "sweep", silent)
    weights.write_bytes(there)
    run_sweep(sweep, tmp_path / "sweep", said.append)
    assert said == []


def test_two_processes_do_not_share_a_sweep(base, tmp_path):
    with (
        alone(tmp_path / ".lock", "the sweep is", "wait"),
        pytest.raises(ValueError, match=r"is in use by process \d+"),
    ):
        run_sweep(sweep_of(base), tmp_path, silent)


def test_what_a_sweep_comes_to(base, tmp_path):
    """Means and intervals from the runs' marks; the base model once."""
    sweep = sweep_of(base)
    documents = run_sweep(sweep, tmp_path, silent)
    for (name, seed), document in documents.items():
        right = {"one": "1" * (3 + seed) + "0" * (4 - seed), "two": "11000"} if name != BASE else document["right"]
        documents[name, seed] = {**document, "right": right}
    untouched, one, _ = results_of(sweep, documents)
    assert (untouched.seeds, untouched.step_seconds, untouched.trainable_parameters) == ([0], None, 0)
    assert untouched.accuracy["one"].half is None
    assert one.seeds == [0, 1]
    assert one.accuracy["one"].mean == pytest.approx((3 / 7 + 4 / 7) / 2)
    assert one.accuracy["one"].half == pytest.approx(12.706 * (1 / 7) / 2, rel=1e-3)
    assert one.accuracy["two"] == (pytest.approx(0.4), pytest.approx(0, abs=1e-12))
    assert one.average.mean == pytest.approx((0.5 + 0.4) / 2)
    assert one.step_seconds == min(documents["t1", seed]["seconds"]["per_step"] for seed in (0, 1))
    assert len(one.load_variation) == 1
    document = json.loads(json.dumps(document_of(sweep, [untouched, one], documents)))
    assert document["series"][0]["points"] == [[1, "t1"], [2, "t-2-gru-0.25"]]
    assert document["results"][1]["accuracy"]["one"]["mean"] == pytest.approx(0.5)
    assert {"versions", "commit", "dtype"} <= set(document["conditions"])


def test_a_setting_that_diverges_is_a_result_and_the_sweep_goes_on(base, tmp_path, monkeypatch):
    def diverges(run: TrainingRecipe, *args: Any, **kwargs: Any) -> Any:
        result = train(run, *args, **kwargs)
        if run.rounds == 2 and run.seed == 0:
            raise DivergedError("the loss is nan at step 2")
        return result

    monkeypatch.setattr(one_run, "train", diverges)
    sweep = sweep_of(base)
    _, one, two = results_of(sweep, run_sweep(sweep, tmp_path, silent))
    assert (one.seeds, one.diverged) == ([0, 1], [])
    assert (two.seeds, two.diverged) == ([1], [0])
    assert two.average is not None
    assert not (tmp_path / ADAPTERS / "t-2-gru-0.25.seed0").exists()


def test_a_sweep_that_is_killed_while_it_tidies_goes_on(base, tmp_path, monkeypatch):
    """Of what diverged a part may be left, of what was trained its checkpoints."""

    class KilledError(BaseException):
        pass

    def diverges(run: TrainingRecipe, *args: Any, **kwargs: Any) -> Any:
        result = train(run, *args, **kwargs)
        if run.rounds == 2:
            raise DivergedError("the loss is nan at step 2")
        return result

    def killed(folder: Path) -> None:
        (folder / "recipe.yaml").unlink(missing_ok=True)
        raise KilledError

    monkeypatch.setattr(one_run, "train", diverges)
    sweep, adapters = sweep_of(base, seeds=(0,)), tmp_path / ADAPTERS
    with monkeypatch.context() as patched:
        patched.setattr(sweep_module, "remove", killed)
        with pytest.raises(KilledError):
            run_sweep(sweep, tmp_path, silent)
    assert len(list(adapters.glob("t1.seed0/checkpoint-*"))) == 2
    with monkeypatch.context() as patched:
        patched.setattr(sweep_module, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KilledError):
            run_sweep(sweep, tmp_path, silent)
    assert (adapters / "t-2-gru-0.25.seed0" / "adapter_config.json").exists()
    said: list[str] = []
    _, one, two = results_of(sweep, run_sweep(sweep, tmp_path, said.append))
    assert (one.seeds, two.diverged, said) == ([0], [0], [])
    assert [path.name for path in adapters.iterdir()] == ["t1.seed0"]
    assert not list(adapters.glob("*/checkpoint-*"))


def test_all_seeds_of_a_setting_may_diverge_and_are_drawn_as_nothing(base, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from graphmoe_model.analysis.sweep_plot import draw_sweep

    def diverges(run: TrainingRecipe, *args: Any, **kwargs: Any) -> Any:
        result = train(run, *args, **kwargs)
        if run.rounds == 2:
            raise DivergedError("the loss is nan at step 2")
        return result

    monkeypatch.setattr(one_run, "train", diverges)
    sweep = sweep_of(base, seeds=(0,))
    results = results_of(sweep, run_sweep(sweep, tmp_path, silent))
    assert (results[2].seeds, results[2].average, results[2].accuracy) == ([], None, {})
    draw_sweep("title", results, sweep.series, "conditions", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_differences_name_what_changed_on_both_sides():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == ["b.c 2, not 3", "d None, not 4"]
