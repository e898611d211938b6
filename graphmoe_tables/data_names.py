"""What a name of questions stands for: a task's split, or a file. Wrong names are told before PyTorch is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from graphmoe_tables.paths import looked_for
from graphmoe_tables.tasks import DATA_FOLDER, EVALUATION, TASKS, WheelFile, data_folder, nearest


class TaskSplit(NamedTuple):
    """A split of a task of `graphmoe_tables.tasks.TASKS`, by what the task's source calls it."""

    task: str
    split: str


def data_named(data: str | os.PathLike[str], split: str = EVALUATION) -> TaskSplit | Path:
    """Return what a name of questions stands for, as far as that can be told without reading them.

    Args:
        data: a task (``"boolq"``), a task and a split (``"boolq:train"``), or a file of JSON lines (``"mine.jsonl"``).
            A task goes before a file of its name; write ``./boolq`` for the file.
        split: the split where ``data`` names a task without one: ``"train"``, ``"validation"`` or ``"test"``, or
            ``"evaluation"`` for the one that results of the task are reported on. A file is one split, whole.

    Raises:
        ValueError: no such task, split or file, or questions that were not fetched yet.
    """
    text = os.fspath(data)
    name, _, own = text.partition(":")
    if name in TASKS:
        found = TaskSplit(name, _split(name, own or split))
        if isinstance(TASKS[name].source, WheelFile):
            _check_fetched(found)
        return found
    path = Path(text)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name one file of questions in it, with one JSON object per line")
    if path.exists():
        return path
    if path.suffix or len(path.parts) > 1:
        raise ValueError(f"there is no file {path} to read questions from{looked_for(path)}")
    raise ValueError(f"unknown task {name!r}{nearest(name, TASKS)}; there are {', '.join(TASKS)}, or a .jsonl file")


def fetched_file(found: TaskSplit) -> Path:
    """Return where `graphmoe data fetch` puts the questions of a task from the package index."""
    return data_folder() / found.task / f"{found.split}.jsonl"


def _split(name: str, asked: str) -> str:
    """What the source of a task calls the split; `ValueError` if it has none of that name with answers."""
    task = TASKS[name]
    found = task.evaluation if asked == EVALUATION else asked
    if found not in task.splits:
        raise ValueError(
            f"the task {name} has no split {asked!r} with answers; it has {', '.join(task.splits)} "
            f"({task.evaluation} for evaluation)"
        )
    return found


def _check_fetched(found: TaskSplit) -> None:
    if not fetched_file(found).is_file():
        raise ValueError(
            f"{found.task} is not in {data_folder()}: run graphmoe data fetch {found.task}, or set {DATA_FOLDER} to "
            "the folder where it is"
        )
