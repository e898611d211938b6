"""Questions by the name of a task or of a file: what training and evaluation both call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from graphmoe_model.questions.hub import read_hub_task
from graphmoe_model.questions.json_lines import read_questions
from graphmoe_model.questions.question_set import QuestionSet
from graphmoe_tables.data_names import TaskSplit, data_named, fetched_file
from graphmoe_tables.tasks import EVALUATION, TASKS, WheelFile


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
    found = data_named(data, split)
    if isinstance(found, Path):
        return QuestionSet(found.stem, found.stem, os.fspath(data), read_questions(found))
    if isinstance(TASKS[found.task].source, WheelFile):
        return _fetched_questions(found)
    return read_hub_task(found.task, found.split)


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


def _fetched_questions(found: TaskSplit) -> QuestionSet:
    """A task's questions from the folder of fetched data, as they were published."""
    task, path = TASKS[found.task], fetched_file(found)
    questions = read_questions(path, equal_choices=True)
    if len(questions) != task.splits[found.split]:
        raise ValueError(
            f"{path} has {len(questions):,} questions, and {task.title}'s {found.split} has "
            f"{task.splits[found.split]:,}: it was changed; run graphmoe data fetch {found.task}, or name the file "
            "itself"
        )
    return QuestionSet(found.task, found.split, f"{task.source}, {found.split}", questions)
