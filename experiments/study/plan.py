"""Which runs come when, at which rate, and how long they take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from experiments.study.results import Results, StudyError
from experiments.study.settings import VALIDATION, Method, Part, Rate, Run


class Slot(NamedTuple):
    """A place in the order of runs.

    Attributes:
        task, method, seed: of the run.
        rate: of the grid, with the first seed; None where it is the one that the first seed chooses, or there is none.
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

    With the first seed all methods run at the first rate of their grids, then at the second, and so on; then all
    methods with the second seed. Tasks take turns.
    """
    trained = [method for method in part.methods if method.trained]
    order: list[Slot] = []
    for seed in part.seeds:
        grid = range(len(trained[0].rates)) if seed == part.seeds[0] else range(1)
        for position in grid:
            for task in part.tasks:
                if position == 0:
                    bases = [method for method in part.methods if not method.trained]
                    order += [Slot(task, base, seed, None) for base in bases if seed in part.seeds_of(base)]
                for method in trained:
                    rate = method.rates[position] if seed == part.seeds[0] else None
                    order.append(Slot(task, method, seed, rate))
    return order


def run_of(slot: Slot, results: Results) -> Run | Undecided:
    """Return the run of a slot, with the rate that the first seed chose where the slot leaves it open."""
    part = results.part
    if slot.rate is not None or not slot.method.trained:
        return Run(part, slot.task, slot.method, slot.rate, slot.seed)
    chosen = chosen_rate(slot.task, slot.method, results)
    return chosen if isinstance(chosen, Undecided) else Run(part, slot.task, slot.method, chosen, slot.seed)


def chosen_rate(task: str, method: Method, results: Results) -> Rate | Undecided:
    """Return the rate of the highest validation accuracy with the first seed; of equal ones the first of the grid.

    A run that diverged chooses nothing.
    """
    first = results.part.seeds[0]
    grid = {rate: results.of(Run(results.part, task, method, rate, first)) for rate in method.rates}
    missing = [rate.name for rate, found in grid.items() if found is None]
    if missing:
        return Undecided(f"seed {first} has not been run at {', '.join(missing)}")
    reached = {
        rate: accuracy(found["right"][VALIDATION])
        for rate, found in grid.items()
        if found is not None and found["diverged"] is None
    }
    if not reached:
        return Undecided(f"every rate diverged with seed {first}")
    return max(reached, key=lambda rate: reached[rate])  # max keeps the first of equals


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
