"""When folding pays: the break-even of building the folds against what they save."""

from __future__ import annotations

import math

FOLD_MODES = ("auto", "always", "never")


def fold_break_even(hidden: int, intermediate: int, width: int, rounds: int) -> float:
    """Tokens from which building the folds inside a training step costs less than it saves.

    Building takes 2 F D G (M) + 3 G D F (Q) multiply-adds. Each later round, and each token, saves the base
    projections (3 D F), the GRU's reading of y (3 G D) and the forming of x_t (G D), and adds 2 F G (M) + 3 G F (Q).
    Backward has the same proportions. Infinite where a folded round costs as much as a literal one.
    """
    if rounds < 2:
        return math.inf
    build = 5 * width * hidden * intermediate
    saved = 3 * hidden * intermediate + 4 * width * hidden - 5 * width * intermediate
    return build / ((rounds - 1) * saved) if saved > 0 else math.inf
