"""What `train` tells before it trains: what it will do, and what of the questions a user should know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from graphmoe_model.questions import Question
from graphmoe_model.training import train
from tests.model import training_runs
from tests.model.training_runs import make_questions, recipe, trained

QUESTIONS = make_questions(24)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return training_runs.make_base(tmp_path_factory.mktemp("base"))


def said(base: Path, folder: Path, eval_questions=(), **changes: Any) -> list[str]:
    """What a run tells."""
    lines: list[str] = []
    train(recipe(base, folder, **{"max_steps": 1, **changes}), QUESTIONS, eval_questions, say=lines.append)
    return lines


def test_a_run_says_first_what_it_will_do(base, tmp_path):
    """Steps may take minutes, and the rows of few questions are fewer than a step has."""
    lines = said(base, tmp_path / "out", batch=4, accumulation=8, logging_steps=100)
    first = next(i for i, line in enumerate(lines) if line.startswith("questions: 24, "))
    assert lines[first].startswith("questions: 24, steps: 1, rows per step: 24, trainable parameters: ")
    assert f": {trained(base, tmp_path / 'counted').trainable_parameters:,}; the loss" in lines[first]
    assert lines[first + 1].startswith("step 1/1: loss ")


def test_rows_are_no_longer_than_the_model_has_positions(base, tmp_path):
    """`graphmoe eval` cuts prompts there: what is trained is what is asked."""
    lines = said(base, tmp_path / "out")
    assert "--max-length 512 is more than the 64 positions that the model has: rows have up to 64 tokens" in lines
    assert "max_length: 64\n" in (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8")
    assert not any("positions" in line for line in said(base, tmp_path / "short", max_length=64))


def test_a_rank_alone_changes_the_scale_and_a_run_says_so(base, tmp_path):
    told = "--r 4 with the preset's alpha of 32 is a scale alpha / r of 8, where the preset has 2; for that one give"
    preset = {"preset": "graphmoe-mixlora", "lora_alpha": None}
    assert any(told in line for line in said(base, tmp_path / "alone", r=4, **preset))
    for name, settings in {"both": {"r": 4, "lora_alpha": 8}, "neither": {"r": None}}.items():
        assert not any("scale" in line for line in said(base, tmp_path / name, **{**preset, **settings}))


def test_questions_that_choose_the_checkpoint_are_not_those_that_are_trained_on(base, tmp_path):
    """Whatever answer they are said to have."""
    same = QUESTIONS[:3]
    lines = said(base, tmp_path / "out", same, eval_data=("held out",))
    assert any(line.startswith("3 of 3 questions of --eval-data are in --data too") for line in lines)
    other = [Question(f"{question.question} stone stone stone", question.choices, 0) for question in same]
    assert not any("--eval-data" in line for line in said(base, tmp_path / "other", other, eval_data=("held out",)))
