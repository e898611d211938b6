"""The results of a part: one JSON per run in a folder; one process at a time adds those of a method on a task."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments.study.settings import Part, Run
from graphmoe_model.analysis import one_process
from graphmoe_model.analysis.differences import differences
from graphmoe_model.evaluation.document import read_document, write_document

RESULTS = Path(__file__).resolve().parents[1] / "results"
LOCK = ".lock-"  # and task and method


class StudyError(ValueError):
    """What a person has to change before the study can go on."""


def runs_of(part: Part) -> list[Run]:
    """Return every run that a part could have: each method at each of its rates with each seed."""
    return [
        Run(part, task, method, rate, seed)
        for task, method in itertools.product(part.tasks, part.methods)
        for seed in part.seeds_of(method)
        for rate in method.rates or (None,)
    ]


class Results:
    """The results of one part.

    Args:
        part: which runs there are.
        folder: where its JSON files are; it need not be there yet.

    Raises:
        StudyError: a file is no result, is of none of the part's runs, or of a run with other settings: both are named.
    """

    def __init__(self, part: Part, folder: Path) -> None:
        self.part, self.folder = part, folder
        self._found: dict[str, dict[str, Any]] = {}
        runs = {run.name: run for run in runs_of(part)}
        for path in sorted(folder.glob("*.json")):
            if path.stem not in runs:
                raise StudyError(
                    f"{path} is of no run of the part {part.name} as its table is now; move it elsewhere, or put the "
                    "table back"
                )
            self._found[path.stem] = _checked(path, runs[path.stem])

    def __len__(self) -> int:
        return len(self._found)

    def of(self, run: Run) -> Mapping[str, Any] | None:
        """Return the result of a run; None if it was not run yet."""
        return self._found.get(run.name)

    def all(self) -> list[Mapping[str, Any]]:
        """Return every result."""
        return list(self._found.values())

    def path(self, run: Run) -> Path:
        """Return the file of a run's result."""
        return self.folder / f"{run.name}.json"

    def add(self, run: Run, document: dict[str, Any]) -> None:
        """Keep a run's result, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_document({"settings": run.settings, "digest": run.digest, **document}, self.path(run))
        self._found[run.name] = _checked(self.path(run), run)


def _checked(path: Path, run: Run) -> dict[str, Any]:
    try:
        document = read_document(path, "a result of the study")
    except ValueError as error:
        raise StudyError(f"{error}; remove it, and its run is run again") from error
    if document.get("digest") != run.digest:
        settings = document.get("settings")
        changed = differences(settings if isinstance(settings, dict) else {}, run.settings)
        raise StudyError(
            f"{path} was made with other settings than the table of the part {run.part.name} has now: "
            f"{'; '.join(changed) or 'its digest alone differs'}. Move {path.parent} elsewhere and start anew, or put "
            "the table back"
        )
    return document


@contextmanager
def alone(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Keep other processes away from some of a folder's results; the system lets go when this process ends, however.

    Args:
        folder: of the results.
        names: of tasks with their methods, ``quartz.mixlora``.

    Raises:
        StudyError: another process has one of them (its id is named), or the folder cannot be written to.
    """
    instead = "name another folder, or other tasks or methods by --only"
    with ExitStack() as held:
        for name in names:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = one_process.alone(folder / f"{LOCK}{name}", f"the results of {name} in {folder} are", instead)
                held.enter_context(lock)
            except OSError as error:
                raise StudyError(f"{folder} cannot be written to: {error.strerror}; name another folder") from error
            except ValueError as error:
                raise StudyError(str(error)) from error
        yield
