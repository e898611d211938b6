"""95% intervals over questions, by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DRAWS, BOOTSTRAP_SEED = 2000, 0


def over_questions(one: Sequence[str], other: Sequence[str]) -> tuple[float, float]:
    """Return the 95% interval of the difference of two accuracies by the bootstrap over questions (Efron, 1979).

    Questions are drawn with replacement, the same for both and for all seeds, so that neither the questions' difficulty
    nor their dependence between seeds widens or narrows it. It says how far the questions asked speak for others, with
    the seeds as they are.

    Args:
        one, other: of each seed, a 1 or a 0 per question; where the seeds have questions of their own, questions are
            drawn by their place.

    Raises:
        ValueError: not as many seeds, or not as many questions, on both sides.
    """
    differences = _marks(one) - _marks(other)  # [seeds, Q]
    per_question = differences.mean(axis=0)  # [Q]
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    draws = rng.integers(0, len(per_question), size=(DRAWS, len(per_question)))  # [draws, Q]
    low, high = np.quantile(per_question[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _marks(right: Sequence[str]) -> NDArray[np.float64]:
    if not right or len({len(marks) for marks in right}) != 1 or not right[0]:
        raise ValueError(f"each seed needs as many marks as the others, got {[len(marks) for marks in right]}")
    return np.array([[float(mark) for mark in marks] for marks in right])
