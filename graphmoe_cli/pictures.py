"""Whether a command draws: ``--plot``, ``--no-plot``, or neither."""

from __future__ import annotations

import importlib.util

NO_MATPLOTLIB = "matplotlib is not installed; it comes with pip install 'graphmoe[bench]'"


def drawn(plot: bool | None) -> bool:
    """Tell whether pictures are drawn: where they are not ruled out, and matplotlib is installed.

    Raises:
        ValueError: they were asked for, and it is not.
    """
    there = importlib.util.find_spec("matplotlib") is not None
    if plot and not there:
        raise ValueError(f"--plot: {NO_MATPLOTLIB}, or leave the pictures out by --no-plot")
    return plot is not False and there
