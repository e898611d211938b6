"""What ``graphmoe train`` does: read the questions, train, and say how it ended."""

from __future__ import annotations

import shlex

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_model.questions import Question, load_questions
from graphmoe_model.training import TrainingRecipe, TrainingResult, train
from graphmoe_model.training.callbacks import duration
from graphmoe_tables.printing import print_whole
from graphmoe_tables.tasks import TASKS

TEST_FILE = "YOUR-TEST.jsonl"  # stands in the command that evaluates for questions that training has not seen


def run(recipe: TrainingRecipe, *, resume: bool, console: Console) -> TrainingResult:
    """Train by a recipe and print a small table.

    Raises:
        ValueError: whatever is wrong with one of the options, the questions, the model or the folder.
    """
    questions = _questions(recipe.data, "train")
    evaluation = _questions(recipe.eval_data or (), "validation")
    result = train(
        recipe, questions, evaluation, resume=resume, say=lambda line: console.print(Text(line), soft_wrap=True)
    )
    print_whole(_table(recipe, result), console)
    console.print(Text(f"Adapter, recipe.yaml and train_result.json: {recipe.output}"), soft_wrap=True)
    console.print(Text(f"Evaluate it: {_eval_command(recipe, result.conditions['dtype'])}"), soft_wrap=True)
    return result


def _questions(names: tuple[str, ...], split: str) -> list[Question]:
    return [question for name in names for question in load_questions(name, split).questions]


def _table(recipe: TrainingRecipe, result: TrainingResult) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    rows = {
        "steps": f"{result.steps:,}" + (f" (from {result.resumed_from:,})" if result.resumed_from else ""),
        "questions": f"{result.questions:,}" + (f", {result.truncated:,} cut" if result.truncated else ""),
        "loss, first and last logged": _pair(result.first_loss, result.last_loss),
        "router loss": _number(result.last_router_loss),
        "evaluation loss": "none" if result.eval_loss is None else f"{result.eval_loss:.4g} (step {result.best_step})",
        "time": duration(result.seconds),
        "peak memory": "unknown" if result.peak_memory is None else f"{result.peak_memory / 1e9:.2f} GB",
        "trainable parameters": f"{result.trainable_parameters:,}",
        "adapter": f"{result.adapter_bytes / 1e6:.1f} MB",
    }
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _pair(first: float | None, last: float | None) -> str:
    return f"{_number(first)}, {_number(last)}"


def _eval_command(recipe: TrainingRecipe, dtype: str) -> str:
    """The command that evaluates the adapter, on the base as it was trained on."""
    names = [name.partition(":")[0] for name in recipe.eval_data or recipe.data]
    tasks = list(dict.fromkeys(name for name in names if name in TASKS))  # each on the split that it is reported on
    # A file is one split, and these were trained on, or chose the checkpoint.
    data = [*tasks, *([TEST_FILE] if any(name not in TASKS for name in names) else [])]
    words = ["graphmoe eval", "--model", shlex.quote(recipe.model), "--adapter", shlex.quote(recipe.output)]
    if recipe.gguf_file is not None:
        words += ["--gguf-file", shlex.quote(recipe.gguf_file)]
    words += ["--load-in-4bit"] * recipe.load_in_4bit + ["--load-in-8bit"] * recipe.load_in_8bit
    return " ".join([*words, "--dtype", dtype, "--data", *data])
