"""How long the demo trains and how much it measures, and where it leaves what it makes: what its options are about."""

from __future__ import annotations

from typing import NamedTuple

LATENCY_SIZES = {"hidden": 768, "intermediate": 2304, "tokens": 256}
# The demo's folders in the report's. Each has a file that says whose it is, so that none of anybody else is emptied.
MARK = ".graphmoe-demo"
BASE, QUESTIONS, TRAINED = FOLDERS = ("base", "questions", "adapter")


class Scale(NamedTuple):
    """How long the demo trains and how much it measures."""

    base_steps: int
    steps: int  # of fine-tuning
    comparison_steps: int  # of each method; 0 leaves the comparison out
    questions: int  # held out, of each skill
    latency: dict[str, int]


FULL = Scale(base_steps=1900, steps=800, comparison_steps=130, questions=100, latency=LATENCY_SIZES)
QUICK = Scale(
    base_steps=4,
    steps=4,
    comparison_steps=2,
    questions=5,
    latency={"hidden": 64, "intermediate": 160, "tokens": 16, "repeats": 2},
)
