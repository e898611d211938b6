"""Sweeps on a tiny base model: what their tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphmoe_model.analysis import sweeps
from graphmoe_model.analysis.sweep import Sweep, fitted_recipe
from graphmoe_model.questions import QuestionSet
from graphmoe_tables.recipe import TrainingRecipe
from tests.model.training_runs import make_questions, recipe


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
