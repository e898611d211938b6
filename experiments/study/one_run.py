"""One run: trained as `graphmoe train` trains, asked as `graphmoe eval` asks, told as JSON."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from experiments.study.settings import Base, Run
from graphmoe_model.base_models import ModelSource, load_base_model, load_tokenizer
from graphmoe_model.evaluation import EvaluationTask, first_token_answers
from graphmoe_model.evaluation.adapters import attach_adapter, saved_config
from graphmoe_model.evaluation.document import conditions_of
from graphmoe_model.questions import Question
from graphmoe_model.training import DivergedError, TrainingResult, train
from graphmoe_model.training.callbacks import LOAD_FILE

BATCH = 16  # prompts per forward when it is asked
LOGS = 5  # how many of the last logged steps the load of experts is told of


def carry_out(run: Run, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run a run, going on with what one that was killed left in ``work``, and return its result as JSON takes it.

    ``right`` has, for each split and group of questions, a 1 for each question that was answered right and a 0 for each
    other, in the questions' order.

    Raises:
        ValueError: as `graphmoe_model.training.train`, but for a loss that is not finite: that is a result too.
    """
    started = time.monotonic()
    base = run.part.material.base(run.seed, work)
    folder = run_folder(run, work)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trained, diverged = None, None
    if run.method.trained:
        questions = run.part.material.questions(run.task, "train", run.seed)
        try:
            trained = train(run.recipe_in(folder, base), questions, resume=folder.exists(), say=say)
        except DivergedError as error:
            diverged = str(error)
    right: dict[str, dict[str, str]] = {}
    begun = time.monotonic()
    conditions: dict[str, Any] = {}
    if diverged is None:
        right, conditions = _asked(run, base, folder)
    gc.collect()
    return {
        "diverged": diverged,
        "right": right,
        "load_variation": load_variation(folder / LOAD_FILE) if trained is not None else None,
        "seconds": {
            "per_step": None if trained is None else _per_step(trained),
            "asking": round(time.monotonic() - begun, 3),
            "whole": round(time.monotonic() - started, 3),
        },
        "peak_memory": trained.peak_memory if trained is not None and torch.cuda.is_available() else None,
        "trainable_parameters": 0 if trained is None else trained.trainable_parameters,
        "adapter_bytes": 0 if trained is None else trained.adapter_bytes,
        "loss": None if trained is None else {"first": trained.first_loss, "last": trained.last_loss},
        "conditions": {"created_at": datetime.now(UTC).isoformat(timespec="seconds"), **conditions},
    }


def run_folder(run: Run, work: Path) -> Path:
    """Return where a run's adapter and checkpoints are until its result is written."""
    return work / f"{run.name}-{run.digest[:12]}"


def _per_step(trained: TrainingResult) -> float | None:
    """The seconds of a step; a run that was gone on with has timed those after it alone."""
    timed = trained.steps - trained.resumed_from
    return round(trained.seconds / timed, 4) if timed else None


def _asked(run: Run, base: Base, folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """What was answered right, by split and group, and under which conditions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if run.part.bf16 else torch.float32
    source = ModelSource(base.folder, base.gguf_file, dtype=dtype, device=str(device))
    tokenizer = load_tokenizer(source)
    model: Any = load_base_model(source)
    if run.method.trained:
        model = attach_adapter(model, str(folder), saved_config(str(folder)))
    right = {}
    for split in run.splits:
        questions = run.part.material.questions(run.task, split, run.seed)
        chosen = first_token_answers(model, tokenizer, EvaluationTask(run.task, questions), batch_size=BATCH)
        right[split] = _by_group(run, questions, chosen)
    return right, conditions_of(model, device)


def _by_group(run: Run, questions: Sequence[Question], chosen: Sequence[int]) -> dict[str, str]:
    marks: dict[str, str] = {}
    for question, choice in zip(questions, chosen, strict=True):
        group = run.part.material.group(question)
        marks[group] = marks.get(group, "") + ("1" if choice == question.answer else "0")
    return marks


def load_variation(file: Path) -> list[float] | None:
    """Return the coefficient of variation of the experts' load in each round, a mean over routers and logged steps.

    It is 0 where every expert has the same share and sqrt(n - 1) where one of n has all. None: there are no routers.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    steps = [list(json.loads(line)["load"].values()) for line in lines[-LOGS:]]
    shares = [torch.tensor(router, dtype=torch.float64) for routers in steps for router in routers]  # each [T, n]
    if not shares:
        return None
    stacked = torch.stack(shares)  # [routers and steps, T, n]
    variation = stacked.std(dim=-1, correction=0) / stacked.mean(dim=-1)
    return [round(value, 4) for value in variation.mean(dim=0).tolist()]
