"""One case with its providers: judged, then timed in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.cases import Case, prepare
from benchmarks.judge import Judge
from benchmarks.providers import Provider
from benchmarks.timing import Timing, in_turns


class Group(NamedTuple):
    """The providers of one case that were timed, and why the others were not."""

    case: Case
    timings: dict[str, Timing]
    refused: dict[str, str]


def measure(case: Case, providers: Mapping[str, Provider], seconds: float) -> Group:
    """Judges every provider on the case, and times those that keep the error budget."""
    problem = case.problem()
    judge = Judge(case, problem)
    calls = {name: prepare(provider, case, problem) for name, provider in providers.items()}
    verdicts = {name: judge.verdict(call) for name, call in calls.items()}  # their first call: a warm-up too
    refused = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
    accepted = {name: call for name, call in calls.items() if name not in refused}
    return Group(case, in_turns(accepted, seconds), refused)
