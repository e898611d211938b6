"""Goes through a part's runs in their order, skips those that are done, and stops where the time is up."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from experiments.study.one_run import carry_out, run_folder
from experiments.study.plan import Slot, Undecided, check_only, run_of, seconds_of, slots, wanted
from experiments.study.results import Results, alone
from experiments.study.settings import Part, Run
from graphmoe_model.training.callbacks import duration

Say = Callable[[str], None]


def go_through(part: Part, folder: Path, work: Path, *, budget: float | None, only: Collection[str], say: Say) -> int:
    """Run what is missing of a part, and return how many runs were done now.

    Args:
        part: which runs there are.
        folder: of the results.
        work: of what a run needs until its result is written: adapter, checkpoints, base models that were made.
        budget: seconds; no run begins that would not end within them by its estimate. None: until all is done.
        only: tasks and methods; empty for all.
        say: takes lines for the user.

    Raises:
        StudyError: an unknown name in ``only``, results with other settings, another process at work.
    """
    check_only(part, only)
    begun, done = time.monotonic(), 0
    names = dict.fromkeys(f"{slot.task}.{slot.method.name}" for slot in slots(part) if wanted(slot, only, part))
    with alone(folder, list(names)):
        results = Results(part, folder)
        for slot in slots(part):
            if not wanted(slot, only, part):
                continue
            run = run_of(slot, results)
            if isinstance(run, Undecided):
                say(f"{_name(slot)}: left out, {run.reason}")
                continue
            if results.of(run) is not None:
                continue
            needed = seconds_of(slot, results)
            left = sum(seconds_of(each, results) for each in _missing(results, only))
            if budget is not None and time.monotonic() - begun + needed > budget:
                say(f"{run.name} would take about {duration(needed)}, which the budget does not have left: stopped")
                break
            say(f"{run.name}: about {duration(needed)}; all that is missing takes about {duration(left)}")
            _one(run, results, work, say)
            done += 1
        say(f"{part.name}: {_count(done)} done now, {len(_missing(results, only))} missing")
    return done


def dry_run(part: Part, folder: Path, work: Path, *, only: Collection[str], say: Say) -> None:
    """Say what would be run, in which order, and how long it takes; nothing is run or written.

    Raises:
        StudyError: an unknown name in ``only``, or results with other settings.
    """
    check_only(part, only)
    results = Results(part, folder)
    for slot in slots(part):
        if wanted(slot, only, part):
            run = run_of(slot, results)
            say(f"{_name(slot):60} {_state(slot, run, results, work)}")
    missing = _missing(results, only)
    total = sum(seconds_of(slot, results) for slot in missing)
    say(f"{part.name}: {_count(len(missing))} missing, about {duration(total)}")


def _one(run: Run, results: Results, work: Path, say: Say) -> None:
    begun = time.monotonic()
    document: dict[str, Any] = carry_out(run, work, lambda line: say(f"  {line}"))
    results.add(run, document)
    shutil.rmtree(run_folder(run, work), ignore_errors=True)
    say(f"{run.name}: {duration(time.monotonic() - begun)}, {results.path(run)}")


def _missing(results: Results, only: Collection[str]) -> list[Slot]:
    """The slots without a result, those whose rate is not chosen yet among them."""
    found = []
    for slot in slots(results.part):
        if wanted(slot, only, results.part):
            run = run_of(slot, results)
            if isinstance(run, Undecided) or results.of(run) is None:
                found.append(slot)
    return found


def _state(slot: Slot, run: Run | Undecided, results: Results, work: Path) -> str:
    if isinstance(run, Run) and results.of(run) is not None:
        return "done"
    about = f"about {duration(seconds_of(slot, results))}"
    if isinstance(run, Undecided):
        return f"{about}, at the rate that is best on validation"
    return f"{about}, begun" if run_folder(run, work).exists() else about


def _name(slot: Slot) -> str:
    rate = "" if slot.rate is None else f" at {slot.rate.title}"
    return f"{slot.task}, {slot.method.title}{rate}, seed {slot.seed}"


def _count(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"
