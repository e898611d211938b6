"""Sweeps: what is run, that it is run once whatever interrupts it, and what is told of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("lm_eval")

from graphmoe_model.analysis import one_run, sweeps
from graphmoe_model.analysis.differences import differences
from graphmoe_model.analysis.one_process import alone
from graphmoe_model.analysis.sweep import (
    ADAPTERS,
    BASE,
    RUNS,
    Setting,
    Sweep,
    fitted_recipe,
    run_name,
    run_sweep,
)
from graphmoe_model.analysis.sweep_report import document_of, results_of
from graphmoe_model.base_models import ModelSource, load_base_config
from graphmoe_model.parameters import adapter_parameters
from graphmoe_model.questions import QuestionSet
from graphmoe_model.training import DivergedError, train
from graphmoe_model.training.models import adapter_config
from graphmoe_tables.recipe import TrainingRecipe
from tests.model.training_runs import make_base, make_questions, recipe

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def started(base: Path, **changes: Any) -> TrainingRecipe:
    return fitted_recipe(recipe(base, Path("unused"), max_steps=2, save_steps=1, **changes))


def question_set(name: str, count: int, seed: int) -> QuestionSet:
    return QuestionSet(name, "test", f"{name}.jsonl", tuple(make_questions(count, seed)))


def sweep_of(base: Path, plan: sweeps.Plan | None = None, **changes: Any) -> Sweep:
    start = started(base)
    plan = plan or sweeps.sensitivity(start, [1, 2], [])
    settings: dict[str, Any] = {
        "kind": "sensitivity",
        "recipe": start,
        "settings": plan.settings,
        "series": plan.series,
        "seeds": (0, 1),
        "train": (question_set("train", 24, 0),),
        "asked": {"one": question_set("one", 7, 1), "two": question_set("two", 5, 2)},
    }
    return Sweep(**{**settings, **changes})


def silent(line: str) -> None:
    """Say nothing."""


def test_sensitivity_has_each_setting_once(base):
    """The point that both lines share is one run, and T = 1, which has no GRU, has no scale."""
    plan = sweeps.sensitivity(started(base), [1, 2, 3], [0.25, 0.5])
    assert [own.name for own in plan.settings] == ["base", "t1", "t-2-gru-0.25", "t-3-gru-0.25", "t-2-gru-0.5"]
    assert [own.axis for own in plan.series] == ["rounds T", "GRU width over the hidden size"]
    assert plan.series[0].points == {1: "t1", 2: "t-2-gru-0.25", 3: "t-3-gru-0.25"}
    assert plan.series[1].points == {0.25: "t-2-gru-0.25", 0.5: "t-2-gru-0.5"}
    assert plan.settings[1].changes == {"rounds": 1, "gru_hidden_scale": None, "gru_learning_rate": None}
    one = sweeps.sensitivity(started(base, rounds=1, gru_hidden_scale=None), [1, 2], [])
    assert [own.name for own in one.settings] == ["base", "t1", "t-2-gru-0.1"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_base_method_has_as_many_parameters_as_the_recipe(base, use_dora):
    """No other rank of it is nearer."""
    start = started(base, use_dora=use_dora)
    plan = sweeps.parameters(start, [2, 5])
    config = load_base_config(ModelSource(str(base)))

    def count(setting: Setting, more: int = 0) -> int:
        changed = {**setting.changes, "r": setting.changes["r"] + more}
        return adapter_parameters(adapter_config(dataclasses.replace(start, **changed)), config).total

    assert [own.name.rpartition("-r")[0] for own in plan.settings[1:]] == ["own", "base-method"] * 2
    for own, other in zip(plan.settings[1::2], plan.settings[2::2], strict=True):
        distances = [abs(count(other, more) - count(own)) for more in (-1, 0, 1)]
        assert distances[1] == min(distances)
        assert own.changes["lora_alpha"] == 2 * own.changes["r"]
        assert other.changes["rounds"] == 1
    shares = [adapter_parameters(adapter_config(start), config).base for _ in (0,)]
    (own_line, base_line) = plan.series
    assert list(own_line.points) == [pytest.approx(100 * count(s) / shares[0]) for s in plan.settings[1::2]]
    assert list(base_line.points) == [pytest.approx(100 * count(s) / shares[0]) for s in plan.settings[2::2]]


def test_activated_changes_the_experts_per_token(base):
    plan = sweeps.activated(started(base), [1, 3])
    assert [own.changes for own in plan.settings] == [None, {"top_k": 1}, {"top_k": 3}]
    assert plan.series[0].points == {1: "top1", 3: "top3"}


ONE_ROUND = {"rounds": 1, "gru_hidden_scale": None}


@pytest.mark.parametrize(
    "changes, plan, message",
    [
        ({}, lambda own: sweeps.sensitivity(own, [1, 1], []), "--rounds must be at least one number, each once"),
        ({}, lambda own: sweeps.sensitivity(own, [], []), "--rounds must be at least one number"),
        (ONE_ROUND, lambda own: sweeps.sensitivity(own, [1], [0.1]), "--scales are those of a GRU, which the recipe's"),
        (ONE_ROUND, lambda own: sweeps.parameters(own, [4]), "the recipe has one round, so it is its own base method"),
        ({"preset": "loramoe"}, lambda own: sweeps.activated(own, [2]), "LoRAMoE chooses no experts"),
    ],
)
def test_plans_that_make_no_sense_are_refused(base, changes, plan, message):
    with pytest.raises(ValueError, match=message):
        plan(started(base, **changes))


def test_a_recipe_that_starts_from_an_adapter_is_refused(base, tmp_path):
    train(recipe(base, tmp_path / "first", max_steps=1), make_questions(8), say=silent)
    start = {"r": None, "lora_alpha": None, "num_experts": None, "rounds": None, "gru_hidden_scale": None}
    started_from = recipe(base, Path("unused"), start_from=str(tmp_path / "first"), **start)
    with pytest.raises(ValueError, match="a sweep trains fresh adapters"):
        sweeps.sensitivity(fitted_recipe(started_from), [1], [])


def test_settings_that_no_recipe_has_are_refused_before_anything_runs(base):
    plan = sweeps.activated(started(base), [2, 9])
    with pytest.raises(ValueError, match=r"top 9: .*top_k"):
        sweep_of(base, plan)
    for seeds in ((), (1, 1), tuple(range(11))):
        with pytest.raises(ValueError, match="--seeds must be 1 to 10 different numbers"):
            sweep_of(base, seeds=seeds)


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
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex and no sweep; name a new folder"):
        run_sweep(sweep_of(base), tmp_path / "other", silent)
    with pytest.raises(ValueError, match="cannot be written to"):
        run_sweep(sweep_of(base), tmp_path / "other" / "thesis.tex" / "x", silent)


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
