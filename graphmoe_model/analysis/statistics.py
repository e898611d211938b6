"""Means with 95% intervals over seeds, by Student's t.

Sums are `math.fsum`'s and means `fmean`'s here and wherever figures are written: Python 3.12 changed how ``sum``
rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

# The 97.5% quantiles of Student's t for 1 to 9 degrees of freedom: 2 to 10 seeds.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(T_QUANTILES) + 1


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
    if not 1 <= count <= MOST_SEEDS:
        raise ValueError(f"an interval over seeds is of 1 to {MOST_SEEDS} of them, got {count}")
    mean = fmean(values)
    if count == 1:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, T_QUANTILES[count - 2] * math.sqrt(variance / count))


def percent(estimate: Estimate) -> str:
    """Write an accuracy in percent."""
    return f"{100 * estimate.mean:.1f}" + ("" if estimate.half is None else f" ± {100 * estimate.half:.1f}")


def signed(estimate: Estimate) -> str:
    """Write a difference of accuracies in points."""
    return f"{100 * estimate.mean:+.1f}" + ("" if estimate.half is None else f" ± {100 * estimate.half:.1f}")
