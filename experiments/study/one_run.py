"""One run of the study, told as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.study.settings import Run
from graphmoe_model.analysis.one_run import marks, run_once
from graphmoe_model.base_models import ModelSource
from graphmoe_model.questions import Question

BATCH = 16  # prompts per forward when it is asked


def carry_out(run: Run, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run a run, going on with what one that was killed left in ``work``, and return its result as JSON takes it.

    ``right`` has, for each split and group of questions, a 1 for each question that was answered right and a 0 for each
    other, in the questions' order.

    Raises:
        ValueError: as `graphmoe_model.analysis.one_run.run_once`.
    """
    base = run.part.material.base(run.seed, work)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if run.part.bf16 else torch.float32
    source = ModelSource(base.folder, base.gguf_file, dtype=dtype, device=device)
    recipe = run.recipe_in(run_folder(run, work), base) if run.method.trained else None
    questions = run.part.material.questions(run.task, "train", run.seed) if run.method.trained else ()
    asked = {split: run.part.material.questions(run.task, split, run.seed) for split in run.splits}
    done = run_once(recipe, questions, source, asked, batch_size=BATCH, say=say)
    chosen = {} if done.answered is None else done.answered.chosen
    right = {split: _by_group(run, asked[split], marks(asked[split], own)) for split, own in chosen.items()}
    return {"right": right, **done.document}


def run_folder(run: Run, work: Path) -> Path:
    """Return where a run's adapter and checkpoints are until its result is written."""
    return work / f"{run.name}-{run.digest[:12]}"


def _by_group(run: Run, questions: Sequence[Question], marked: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for question, mark in zip(questions, marked, strict=True):
        group = run.part.material.group(question)
        found[group] = found.get(group, "") + mark
    return found
