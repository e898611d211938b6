"""Two runs on the same questions, compared question by question.

Most questions are answered alike by two adapters of one base. Those cancel in the difference of the two accuracies, so
its standard error is smaller than the two accuracies' own errors, added, make it look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from graphmoe_model.evaluation.records import RIGHT
from graphmoe_model.presentation import markdown_table


class PairedDifference(NamedTuple):
    """How one run's answers differ from another's to the same questions.

    Attributes:
        mean: difference of the two accuracies, -1 to 1.
        stderr: its standard error over the questions; None for a single question.
        gained: questions that this run alone has right.
        lost: questions that the other run alone has right.
    """

    mean: float
    stderr: float | None
    gained: int
    lost: int


def paired_difference(own: str, other: str) -> PairedDifference:
    """Compare the answers of a run with those of another.

    Args:
        own: ``1`` for each right answer and ``0`` for each wrong one, as ``first_token_right`` of an evaluation.
        other: the same of the other run, to the same questions in the same order.

    Raises:
        ValueError: they are of different lengths, or empty.
    """
    if len(own) != len(other) or not own:
        raise ValueError(f"answers to the same questions are compared, got {len(own)} and {len(other)} of them")
    count = len(own)
    gained = sum(mine > theirs for mine, theirs in zip(own, other, strict=True))
    lost = sum(mine < theirs for mine, theirs in zip(own, other, strict=True))
    mean = (gained - lost) / count
    # each question's difference is 1, 0 or -1, so its square is 1 where the two differ
    stderr = math.sqrt(((gained + lost) / count - mean**2) / (count - 1)) if count > 1 else None
    return PairedDifference(mean, stderr, gained, lost)


def paired_lines(
    names: Sequence[str], tasks: Sequence[str], scores: Sequence[Mapping[str, Mapping[str, Any]]]
) -> list[str]:
    """Return a comparison's table of each later run against the first.

    Args:
        names: of the runs.
        tasks: those that all runs have.
        scores: of each run, by task, as in an evaluation's JSON.
    """
    rows = []
    for name, own in zip(names[1:], scores[1:], strict=True):
        found = [paired_difference(own[task][RIGHT], scores[0][task][RIGHT]) for task in tasks]
        cells = [f"{_points(d.mean, d.stderr)} (+{d.gained:,}, -{d.lost:,})" for d in found]
        rows.append([name, *cells, *([_all(found)] if len(found) > 1 else [])])
    return [
        "",
        f"First-token accuracy less that of {names[0]} on the same questions: points, with the standard error of this "
        "difference, and how many questions were won and lost.",
        "",
        *markdown_table(["run", *tasks, *(["average"] if len(tasks) > 1 else [])], rows),
    ]


def _all(found: Sequence[PairedDifference]) -> str:
    """The mean over tasks, each counting once."""
    errors = [own.stderr for own in found if own.stderr is not None]
    together = math.sqrt(math.fsum(error**2 for error in errors)) / len(found) if len(errors) == len(found) else None
    return _points(fmean(own.mean for own in found), together)


def _points(mean: float, error: float | None) -> str:
    return f"{100 * mean:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
