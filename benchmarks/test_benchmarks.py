"""Every contender of every case: refused if it is wrong, else timed in turns with the others of its case.

    pytest benchmarks [--sizes tiny] [--groups layer,rounds] [--providers torch,dense] [-k training] [--save-results]
    pytest benchmarks --benchmark-json A.json; pytest-benchmark compare A.json B.json

`pytest benchmarks --help` lists the options of this folder under "GraphMoE benchmarks".
"""

from __future__ import annotations

import pytest

from benchmarks.cases import Case, Contender
from benchmarks.session import DeviceLost, NotMeasured, Session

# What a run ends with where the device takes no more work; another process goes on.
LOST_EXIT = 75


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


@pytest.mark.timeout(3600)  # a case's oracle, checks and turns all fall on its first test
@pytest.mark.benchmark(timer=REPLAY)
def test_contender(request: pytest.FixtureRequest, measured: Session, case: Case, contender: Contender) -> None:
    try:
        found = measured[case]
    except DeviceLost as error:
        pytest.exit(f"the device takes no more work: {error}", returncode=LOST_EXIT)
    except NotMeasured as error:
        pytest.skip(str(error))
    fault = found.fault(contender.label)
    if fault is not None:
        pytest.fail(f"{contender.label} is not timed: {fault}", pytrace=False)
    if contender.label in found.samples:  # of a check there is no time, of kernels and profiles there are many
        benchmark, seconds = request.getfixturevalue("benchmark"), found.samples[contender.label].seconds
        times = iter(seconds)
        benchmark.group = case.name
        benchmark.extra_info.update({"provider": contender.provider, "label": contender.label, "case": case.name})
        benchmark.pedantic(REPLAY.advance, setup=lambda: ((next(times),), {}), rounds=len(seconds))
