"""Which runs come when, at which rate, and how long they take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from experiments.study.results import Results, StudyError
from experiments.study.settings import VALIDATION, Method, Part, Rate, Run


class Slot(NamedTuple):
    """A place in the order of runs.

    Attributes:
        task, method, seed: of the run.
        rate: of the grid, with a seed that chooses; None where it is the one that was chosen, or there is none.
    """

    task: str
    method: Method
    seed: int
    rate: Rate | None


class Undecided(NamedTuple):
    """A run whose rate is not chosen yet."""

    reason: str


def slots(part: Part) -> list[Slot]:
    """Return the order of a part's runs: a comparison of all methods is complete as early as can be.

    With a seed that chooses rates all methods run at the first rate of their grids, then at the second, and so on.
    Then come the other seeds, at the chosen rates. Tasks take turns.
    """
    trained = [method for method in part.methods if method.trained]
    order: list[Slot] = []
    for seed in part.seeds:
        chooses = seed in part.choosing
        for position in range(len(trained[0].rates) if chooses else 1):
            for task in part.tasks:
                if position == 0:
                    bases = [method for method in part.methods if not method.trained]
                    order += [Slot(task, base, seed, None) for base in bases if seed in part.seeds_of(base)]
                for method in trained:
                    rate = method.rates[position] if chooses else None
                    order.append(Slot(task, method, seed, rate))
    return order


def run_of(slot: Slot, results: Results) -> Run | Undecided:
    """Return the run of a slot, with the rate that was chosen where the slot leaves it open."""
    part = results.part
    if slot.rate is not None or not slot.method.trained:
        return Run(part, slot.task, slot.method, slot.rate, slot.seed)
    chosen = chosen_rate(slot.task, slot.method, results)
    return chosen if isinstance(chosen, Undecided) else Run(part, slot.task, slot.method, chosen, slot.seed)


def chosen_rate(task: str, method: Method, results: Results) -> Rate | Undecided:
    """Return the rate of the highest validation accuracy, a mean over the seeds that choose; of equal ones the first.

    A rate with which a run diverged is not chosen.
    """
    grid = {rate: validation_accuracy(task, method, rate, results) for rate in method.rates}
    missing = [rate.name for rate, found in grid.items() if isinstance(found, Undecided)]
    if missing:
        return Undecided(f"{seeds_text(results.part.choosing)} not run at {', '.join(missing)}")
    reached = {rate: found for rate, found in grid.items() if isinstance(found, float)}
    if not reached:
        return Undecided(f"every rate diverged with {seeds_text(results.part.choosing)}")
    return max(reached, key=lambda rate: reached[rate])  # max keeps the first of equals


def validation_accuracy(task: str, method: Method, rate: Rate, results: Results) -> float | str | Undecided:
    """Return a rate's validation accuracy, a mean over the seeds that choose; the text "diverged" if a run has.

    `Undecided` if one of the runs is missing.
    """
    found = [results.of(Run(results.part, task, method, rate, seed)) for seed in results.part.choosing]
    runs = [run for run in found if run is not None]
    if len(runs) < len(found):
        return Undecided(f"not run with all of {seeds_text(results.part.choosing)}")
    if any(run["diverged"] is not None for run in runs):
        return "diverged"
    return fmean(accuracy(run["right"][VALIDATION]) for run in runs)


def seeds_text(seeds: Sequence[int]) -> str:
    """Return "seed 0" or "seeds 0, 1, 2"."""
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))


def accuracy(right: Mapping[str, str]) -> float:
    """Return the share of right answers ("1") over all groups' questions."""
    answers = "".join(right.values())
    return answers.count("1") / len(answers)


def seconds_of(slot: Slot, results: Results) -> float:
    """Estimate a run's seconds: the most that one of its method on its task took, else by the table's figures."""
    run = Run(results.part, slot.task, slot.method, slot.rate, slot.seed)
    part, key = results.part, (slot.task, slot.method.name)
    same = [
        found["seconds"]["whole"]
        for found in results.all()
        if (found["settings"]["task"], found["settings"]["method"]) == key and found["diverged"] is None
    ]
    steps = run.steps + len(run.splits) * part.evaluation_steps
    return max(same, default=part.start_seconds + slot.method.step_seconds * steps)


def check_only(part: Part, only: Collection[str]) -> None:
    """`StudyError` for a name that is neither a task nor a method of the part."""
    known = [*part.tasks, *(method.name for method in part.methods)]
    for name in only:
        if name not in known:
            raise StudyError(
                f"--only {name}: the part {part.name} has no such task or method; it has {', '.join(known)}"
            )


def wanted(slot: Slot, only: Collection[str], part: Part) -> bool:
    """Tell whether a slot is among the tasks and the methods that are named; all, where none of a kind is."""
    tasks = [name for name in only if name in part.tasks]
    methods = [name for name in only if name not in part.tasks]
    return (not tasks or slot.task in tasks) and (not methods or slot.method.name in methods)
