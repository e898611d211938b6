"""Every contender of every case: refused if it is wrong, else timed in turns with the others of its case.

    pytest benchmarks [--sizes tiny] [--groups layer,rounds] [--providers torch,dense] [-k training] [--save-results]

`pytest benchmarks --help` lists the options of this folder under "GraphMoE benchmarks".
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case, Contender
from benchmarks.memory import TooLarge
from benchmarks.session import Session
from benchmarks.sizes import Model


class Replay:
    """A clock for pytest-benchmark that shows times measured before.

    pytest-benchmark times one test to its end before the next; in turns it cannot. So a case is measured when its first
    test asks for it, and each test plays its contender's times back, which brings them into its tables and files.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


REPLAY = Replay()


@pytest.mark.timeout(3600)
def test_profile(measured: Session, profiled: Model) -> None:
    """Every part of the model is in its profile: a share of nothing would mislead."""
    found = measured.profile(profiled)
    for profile in found:
        assert profile["seconds"]["attention"] > 0, profile
        assert profile["seconds"]["mlp"] > 0, profile


@pytest.mark.timeout(3600)  # a case's oracle, checks and turns all fall on its first test
@pytest.mark.benchmark(timer=REPLAY)
def test_contender(benchmark: BenchmarkFixture, measured: Session, case: Case, contender: Contender) -> None:
    try:
        found = measured[case]
    except TooLarge as error:
        pytest.skip(str(error))
    fault = found.fault(contender.label)
    if fault is not None:
        pytest.fail(f"{contender.label} is not timed: {fault}", pytrace=False)
    times = iter(found.samples[contender.label].seconds)
    benchmark.group = case.name
    rounds = len(found.samples[contender.label].seconds)
    benchmark.pedantic(REPLAY.advance, setup=lambda: ((next(times),), {}), rounds=rounds)
