"""Means and 95% intervals: over seeds by Student's t, over questions by a paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS, BOOTSTRAP_SEED = 2000, 0
# The 97.5% quantiles of Student's t for 1 to 9 degrees of freedom: 2 to 10 seeds.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Estimate(NamedTuple):
    """A mean with the half of its 95% interval; None where one value alone gives no interval."""

    mean: float
    half: float | None


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds and the half width ``t s / sqrt(m)`` of its interval, s with ``m - 1`` below.

    Raises:
        ValueError: no values, or more than the table of quantiles is for.
    """
    count = len(values)
    if not 1 <= count <= len(T_QUANTILES) + 1:
        raise ValueError(f"an interval over seeds is of 1 to {len(T_QUANTILES) + 1} of them, got {count}")
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, None)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, T_QUANTILES[count - 2] * math.sqrt(variance / count))


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
