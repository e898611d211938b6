"""Plans of sweeps: which settings, and which places they have in the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("trl")

from graphmoe_model.analysis import sweeps
from graphmoe_model.analysis.sweep import Setting, fitted_recipe
from graphmoe_model.base_models import ModelSource, load_base_config
from graphmoe_model.parameters import adapter_parameters
from graphmoe_model.training import train
from graphmoe_model.training.models import adapter_config
from graphmoe_tables.recipe import TrainingRecipe
from tests.model.small_sweeps import silent, started
from tests.model.training_runs import make_base, make_questions, recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


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
        assert other.changes["rounds"] == 1
    whole = adapter_parameters(adapter_config(start), config).base
    (own_line, base_line) = plan.series
    assert list(own_line.points) == [pytest.approx(100 * count(s) / whole) for s in plan.settings[1::2]]
    assert list(base_line.points) == [pytest.approx(100 * count(s) / whole) for s in plan.settings[2::2]]


def scales(start: TrainingRecipe, plan: sweeps.Plan) -> set[float]:
    """s of all adapters of a plan."""
    return {adapter_config(dataclasses.replace(start, **own.changes)).scaling() for own in plan.settings[1:]}


@pytest.mark.parametrize("alpha", [4, 2, 6])
def test_a_sweep_of_ranks_keeps_the_scale(base, alpha):
    """Else its pairs would differ in more than parameters."""
    start = started(base, lora_alpha=alpha)  # r is 2
    assert scales(start, sweeps.parameters(start, [1, 2, 5])) == {alpha / 2}


def test_a_rank_without_a_whole_alpha_is_refused(base):
    """With the alpha that it would need, and what to do: the recipe's own rank, the one beside it, and of rsLoRA."""
    start, by_root = started(base, lora_alpha=5, r=2), started(base, lora_alpha=8, r=4, use_rslora=True)
    multiple = "give the recipe an alpha that is a multiple of its r$"
    for recipe_, rank, message in (
        (start, 5, rf"^GraphMoE\(MixLoRA\), r 5: .*, alpha / r of alpha 5 and r 2, needs alpha 12\.5 at.*, {multiple}"),
        (start, 2, rf"^MixLoRA, r 3, beside GraphMoE\(MixLoRA\), r 2: .*needs alpha 7\.5 at this rank.*, {multiple}"),
        (by_root, 8, r"alpha / sqrt\(r\), by use_rslora,.*needs alpha 11\.3137 at.*leave use_rslora out of the recipe"),
        (by_root, 16, r"^MixLoRA, r \d+, beside GraphMoE\(MixLoRA\), r 16: .*leave use_rslora out of the recipe"),
    ):
        with pytest.raises(ValueError, match=message):
            sweeps.parameters(recipe_, [rank])


def test_settings_that_would_share_a_name_are_refused(base):
    message = r"both called 'T = 2, GRU 0\.123456'.*0\.12345601\}; give numbers that"
    with pytest.raises(ValueError, match=message):
        sweeps.sensitivity(started(base), [2], [0.123456, 0.12345601])


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
