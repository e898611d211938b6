"""Questions by the name of a task or of a file: what training and evaluation both call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from graphmoe_model.questions.hub import read_hub_task
from graphmoe_model.questions.json_lines import read_questions
from graphmoe_model.questions.question_set import QuestionSet
from graphmoe_tables.tasks import DATA_FOLDER, EVALUATION, TASKS, WheelFile, data_folder, task_split, unknown_task


def load_questions(data: str | os.PathLike[str], split: str = EVALUATION) -> QuestionSet:
    """Return the questions of a task's split, or of a file.

    Args:
        data: a task of `graphmoe_tables.tasks.TASKS` (``"boolq"``), a task and a split (``"boolq:train"``), or a file
            of JSON lines (``"mine.jsonl"``; docs/questions.md has its form). A task goes before a file of its name;
            write ``./boolq`` for the file.
        split: the split where ``data`` names a task without one: ``"train"``, ``"validation"`` or ``"test"``, or
            ``"evaluation"`` for the one that results of the task are reported on. A file is one split, whole.

    Raises:
        ValueError: no such task, split or file; data that was not fetched yet or cannot be reached; the package
            ``datasets`` is needed and missing; a fault in a row, with the file and its line, or the dataset and its
            row.
    """
    text = os.fspath(data)
    name, _, own = text.partition(":")
    if name in TASKS:
        return _task_questions(name, own or split)
    path = Path(text)
    if path.suffix or path.exists() or len(path.parts) > 1:
        return QuestionSet(path.stem, path.stem, text, read_questions(path))
    raise unknown_task(name)


def load_sets(data: Sequence[str], split: str = EVALUATION) -> dict[str, QuestionSet]:
    """Return several sets of questions by the names that tables give them, in their order.

    A set has its own name; those that would have the same one are called as they were given.

    Args:
        data: each as `load_questions` takes it.
        split: as there.

    Raises:
        ValueError: as there.
    """
    sets = {given: load_questions(given, split) for given in data}
    names = [found.name for found in sets.values()]
    return {found.name if names.count(found.name) == 1 else given: found for given, found in sets.items()}


def _task_questions(name: str, asked: str) -> QuestionSet:
    split, task = task_split(name, asked), TASKS[name]
    if not isinstance(task.source, WheelFile):
        return read_hub_task(name, split)
    folder = data_folder()
    path = folder / name / f"{split}.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{name} is not in {folder}: run graphmoe data fetch {name}, or set {DATA_FOLDER} to the folder where it is"
        )
    questions = read_questions(path, equal_choices=True)  # as they were published
    if len(questions) != task.splits[split]:
        raise ValueError(
            f"{path} has {len(questions):,} questions, and {task.title}'s {split} has {task.splits[split]:,}: it was "
            f"changed; run graphmoe data fetch {name}, or name the file itself"
        )
    return QuestionSet(name, split, f"{task.source}, {split}", questions)
