"""When folding pays: the break-even of building the folds against what they save."""

from __future__ import annotations

import math

FOLD_MODES = ("auto", "always", "never")


def fold_break_even(hidden: int, intermediate: int, width: int, rounds: int, dora: bool = False) -> float:
    """Tokens from which building the folds inside a training step costs less than it saves.

    Building takes 2 F D G (M) + 3 G D F (Q) multiply-adds. Each later round, and each token, saves the base
    projections (3 D F), the GRU's reading of y (3 G D) and the forming of x_t (G D), and adds 2 F G (M) + 3 G F (Q).
    Backward has the same proportions. Infinite where a folded round costs as much as a literal one.

    With ``dora`` only M is built, and only the base gate and up projections (2 D F) and the forming of x_t are saved.
    """
    if rounds < 2:
        return math.inf
    if dora:
        build = 2 * width * hidden * intermediate
        saved = 2 * hidden * intermediate + width * hidden - 2 * width * intermediate
    else:
        build = 5 * width * hidden * intermediate
        saved = 3 * hidden * intermediate + 4 * width * hidden - 5 * width * intermediate
    return build / ((rounds - 1) * saved) if saved > 0 else math.inf
