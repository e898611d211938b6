"""The parts as they are run: ranks that match what they say, grids that are fair, recipes that `train` takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

pytest.importorskip("trl")
pytest.importorskip("lm_eval")

from experiments.study import depth, real
from experiments.study.parts import PARTS
from experiments.study.results import StudyError, runs_of
from experiments.study.settings import Base, Part, Run
from graphmoe_model.parameters import adapter_parameters
from graphmoe_model.training.models import adapter_config
from graphmoe_tables.tasks import TASKS

# One layer of each: an adapter has as many parameters in every layer.
SMOLLM2 = LlamaConfig(
    vocab_size=8,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=1,
    num_attention_heads=9,
    num_key_value_heads=3,
)
TINY = LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4)


def parameters(part: Part, name: str, model: Any, more_rank: int = 0) -> int:
    """Trained parameters of a method, with its rank or one near it."""
    method = part.method(name)
    rank = method.adapter["r"] + more_rank
    changed = dataclasses.replace(method, adapter={**method.adapter, "r": rank, "lora_alpha": 2 * rank})
    recipe = Run(part, part.tasks[0], changed, method.rates[0], 0).recipe_in(Path("out"), Base("base"))
    return adapter_parameters(adapter_config(recipe.resolved()), model).total


@pytest.mark.parametrize(
    "part, model, name, target",
    [
        (real.PART, SMOLLM2, "lora", "mixlora"),
        (real.PART, SMOLLM2, "loramoe", "mixlora"),
        (real.PART, SMOLLM2, "mixlora-matched", "graphmoe-t3"),
        (depth.PART, TINY, "mixlora-matched", "graphmoe-t3"),
    ],
)
def test_no_other_rank_has_the_parameters_of_what_is_compared_with_more_closely(part, model, name, target):
    wanted = parameters(part, target, model)
    distance = [abs(parameters(part, name, model, more) - wanted) for more in (-1, 0, 1)]
    assert distance[1] == min(distance)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_every_method_has_a_grid_of_one_size_with_the_grus_rate_in_it(part):
    for method in part.methods:
        if method.trained:
            assert len(method.rates) == len(set(method.rates)) == {"real": 7, "hard": 3, "depth": 12}[part.name]
            assert all((rate.gru_factor is not None) == (method.adapter["rounds"] > 1) for rate in method.rates)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_runs_differ_in_name_and_digest_and_make_recipes(part):
    runs = runs_of(part)
    assert len({run.name for run in runs}) == len({run.digest for run in runs}) == len(runs)
    for run in runs:
        if run.method.trained:
            recipe = run.recipe_in(Path("out"), Base("base"))
            assert recipe.seed == run.seed
            assert recipe.gru_learning_rate == (
                None if run.rate.gru_factor is None else run.rate.learning_rate * run.rate.gru_factor
            )


def test_the_real_tasks_are_those_that_can_be_fetched(monkeypatch, tmp_path):
    assert {*real.PART.tasks, *real.HARD.tasks} <= set(TASKS)
    monkeypatch.setenv("GRAPHMOE_DATA", str(tmp_path))
    with pytest.raises(StudyError, match="run graphmoe data fetch headlines social_iqa_small quartz smollm2"):
        real.PART.material.base(0, tmp_path)


def test_training_has_as_many_questions_as_its_steps_read():
    recipe = depth.PART.recipe
    assert depth.PART.material.training_count == recipe["batch"] * recipe["max_steps"]
    assert len(depth.PART.seeds) >= 5
    assert len(real.PART.seeds) >= 3
