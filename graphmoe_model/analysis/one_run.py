"""One run: trained as `graphmoe train` trains, asked as `graphmoe eval` asks by the first token, told as JSON."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from graphmoe_model.base_models import ModelSource, load_base_model, load_tokenizer
from graphmoe_model.evaluation import EvaluationTask, first_token_answers
from graphmoe_model.evaluation.adapters import attach_adapter, saved_config
from graphmoe_model.evaluation.document import conditions_of
from graphmoe_model.questions import Question
from graphmoe_model.training import DivergedError, TrainingRecipe, TrainingResult, train
from graphmoe_model.training.callbacks import LOAD_FILE

LOGS = 5  # how many of the last logged steps the load of experts is told of
QuestionSets = Mapping[str, Sequence[Question]]


class Answered(NamedTuple):
    """What a model chose.

    Attributes:
        chosen: of each set, the choice of each question.
        seconds: of each set.
        conditions: of the model that was asked.
    """

    chosen: dict[str, list[int]]
    seconds: dict[str, float]
    conditions: dict[str, Any]


class OneRun(NamedTuple):
    """A run that has ended.

    Attributes:
        answered: None where training diverged.
        document: what is the same for every kind of run, as JSON takes it: ``diverged`` (the reason, or None),
            ``load_variation`` (`load_variation`), ``seconds`` (``per_step``, ``asking``, ``whole``), ``peak_memory``
            in bytes (of a GPU), ``trainable_parameters``, ``adapter_bytes``, ``loss`` (``first``, ``last``) and
            ``conditions``.
    """

    answered: Answered | None
    document: dict[str, Any]


def run_once(
    recipe: TrainingRecipe | None,
    questions: Sequence[Question],
    source: ModelSource,
    asked: QuestionSets,
    *,
    batch_size: int,
    say: Callable[[str], None],
) -> OneRun:
    """Train by a recipe, going on with what a run that was killed left in its folder, and ask.

    Args:
        recipe: of the adapter; None asks the base model as it is.
        questions: to train on.
        source: of the model that is asked.
        asked: what it is asked.
        batch_size: prompts per forward when it is asked.
        say: takes lines for the user.

    Raises:
        ValueError: as `graphmoe_model.training.train`, but for a loss that is not finite: that is a result too.
    """
    started = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trained, diverged = None, None
    if recipe is not None:
        try:
            trained = train(recipe, questions, resume=Path(recipe.output).exists(), say=say)
        except DivergedError as error:
            diverged = str(error)
    begun = time.monotonic()
    adapter = None if recipe is None else recipe.output
    answered = None if diverged else answers(source, adapter, asked, batch_size)
    gc.collect()
    conditions = {"created_at": datetime.now(UTC).isoformat(timespec="seconds")}
    document = {
        "diverged": diverged,
        "load_variation": None if trained is None or adapter is None else load_variation(Path(adapter) / LOAD_FILE),
        "seconds": {
            "per_step": None if trained is None else _per_step(trained),
            "asking": round(time.monotonic() - begun, 3),
            "whole": round(time.monotonic() - started, 3),
        },
        "peak_memory": trained.peak_memory if trained is not None and torch.cuda.is_available() else None,
        "trainable_parameters": 0 if trained is None else trained.trainable_parameters,
        "adapter_bytes": 0 if trained is None else trained.adapter_bytes,
        "loss": None if trained is None else {"first": trained.first_loss, "last": trained.last_loss},
        "conditions": conditions | ({} if answered is None else answered.conditions),
    }
    return OneRun(answered, document)


def answers(source: ModelSource, adapter: str | None, asked: QuestionSets, batch_size: int) -> Answered:
    """Ask a model, with a saved adapter or as it is, every set of questions by the first token of its answers."""
    tokenizer = load_tokenizer(source)
    model: Any = load_base_model(source)
    if adapter is not None:
        model = attach_adapter(model, adapter, saved_config(adapter))
    chosen, seconds = {}, {}
    for name, questions in asked.items():
        begun = time.monotonic()
        chosen[name] = first_token_answers(model, tokenizer, EvaluationTask(name, questions), batch_size=batch_size)
        seconds[name] = time.monotonic() - begun
    return Answered(chosen, seconds, conditions_of(model, next(model.parameters()).device))


def marks(questions: Sequence[Question], chosen: Sequence[int]) -> str:
    """Return a 1 for each question that was answered right and a 0 for each other, in their order."""
    pairs = zip(questions, chosen, strict=True)
    return "".join("1" if choice == question.answer else "0" for question, choice in pairs)


def load_variation(file: Path) -> list[float] | None:
    """Return the coefficient of variation of the experts' load in each round, a mean over routers and logged steps.

    It is 0 where every expert has the same share and sqrt(n - 1) where one of n has all. None: there are no routers.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    steps = [list(json.loads(line)["load"].values()) for line in lines[-LOGS:]]
    shares = [torch.tensor(router, dtype=torch.float64) for routers in steps for router in routers]  # each [T, n]
    if not shares:
        return None
    variation = [own.std(dim=-1, correction=0) / own.mean(dim=-1) for own in shares]  # each [T]
    longest = max(len(own) for own in variation)
    rounds = [[float(own[i]) for own in variation if len(own) > i] for i in range(longest)]
    return [round(fmean(own), 4) for own in rounds]


def _per_step(trained: TrainingResult) -> float | None:
    """The seconds of a step; a run that was gone on with has timed those after it alone."""
    timed = trained.steps - trained.resumed_from
    return float(f"{trained.seconds / timed:.4g}") if timed else None
