"""The order of a run whose time is limited: the most important cases first, and what one of them may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.cases import Case
from benchmarks.document import WITHOUT_ROUNDS
from benchmarks.table import COMPILED, Plan
from graphmoe_kernels.cost import Sizes

# Seconds of trying and timing one kernel's configurations.
TUNING = 60.0


class Stage(NamedTuple):
    """Cases that come next in a run whose time is limited, and how many seconds one of them may take."""

    seconds: float
    has: Callable[[Case, Sizes], bool]


def stages(plan: Plan, dtype: str) -> tuple[Stage, ...]:
    """The most important first: right, then the layer at the sizes of the targets, then everything else."""
    main, first = plan.main, plan.decode[0]

    def layer(mode: str, rounds: int, *tokens: int, note: str = "") -> Callable[[Case, Sizes], bool]:
        wanted = ("layer", mode, rounds, note)
        return lambda case, s: (case.group, case.mode, s.rounds, case.note) == wanted and s.tokens in tokens

    def group(name: str, *tokens: int) -> Callable[[Case, Sizes], bool]:
        return lambda case, s: case.group == name and (not tokens or s.tokens in tokens)

    return (
        Stage(15, lambda case, s: case.group == "check" and s.dtype == dtype),
        Stage(30, layer("inference", 3, main)),
        Stage(25, layer("inference", 3, *plan.decode[:2])),
        Stage(50, layer("training", 3, main)),
        Stage(20, group("decoder")),
        Stage(10, group("routing", first, *plan.routing, main)),
        Stage(20, layer("inference", 1, main, first)),
        Stage(70, layer("inference", 3, main, note=COMPILED)),
        Stage(90, layer("training", 3, main, note=COMPILED)),
        Stage(12, lambda case, s: case.group == "kernels" and s.experts != plan.many and s.tokens in (main, first)),
        Stage(15, lambda case, s: (case.group, case.mode) == ("layer", "inference") and s.rounds == 3),
        Stage(30, layer("training", 1, main)),
        Stage(60, group("rounds")),
        Stage(30, group("model")),
        Stage(60, group("profile")),
        Stage(20, group("host")),
        Stage(15, lambda case, s: case.group in ("expert_swiglu", "gru_step") and s.tokens in (first, main)),
        Stage(40, group("methods")),
        Stage(20, group("scaling")),
        Stage(TUNING + 20, group("tune")),
        Stage(15, lambda case, s: True),
    )


def rank(case: Case, plan: Plan, dtype: str) -> tuple[int, float]:
    """The case's place in the order of importance, and how many seconds it may take."""
    sizes = next((c.sizes for c in case.contenders if c.provider not in WITHOUT_ROUNDS), case.sizes)
    return next((i, stage.seconds) for i, stage in enumerate(stages(plan, dtype)) if stage.has(case, sizes))
