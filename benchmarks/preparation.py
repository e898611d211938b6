"""What a contender is before it is timed: how it is checked, and the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.cases import Contender
from benchmarks.checks import Verdict
from benchmarks.devices import Call


class Work(NamedTuple):
    """What a call needs at least.

    Attributes:
        bytes: each weight, input and output once; None where that is no property of the task.
        operations: floating-point, a multiply-add is two.
    """

    bytes: float | None
    operations: float


class Prepared(NamedTuple):
    """A contender that is ready to be checked and timed.

    Attributes:
        contender: who it is.
        check: its verdict; what is wrong is not timed.
        call: what is timed.
        calls: how many equal calls ``call`` makes.
        work: of one of them, where the cost model has it.
        capture: whether ``call`` is replayed as a CUDA graph.
        verify: what is wrong with a result of the call that is timed, if anything: a graph could replay another.
        units: tokens made by one of the calls, for rates.
    """

    contender: Contender
    check: Callable[[], Verdict]
    call: Call
    calls: int = 1
    work: Work | None = None
    capture: bool = False
    verify: Callable[[object], str | None] | None = None
    units: int | None = None
