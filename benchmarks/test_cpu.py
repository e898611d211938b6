"""The layer on a CPU, fp32: folded against the literal loop and against a peer, one round and three.

    pytest benchmarks -k cpu [--threads 2] [--seconds 15] [--providers folded,literal] [--save-results]

Nothing here fails for being slow: a provider fails that is wrong, and the tables at the end say which targets were met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import MODES, Case
from benchmarks.groups import Group, measure
from benchmarks.providers import PROVIDERS
from benchmarks.results import Target
from benchmarks.timing import Replay
from graphmoe_kernels.cost import Sizes

HIDDEN = 2048
SIZES = {
    rounds: Sizes(
        hidden=HIDDEN,
        intermediate=5632,
        gru_width=int(0.1 * HIDDEN),
        experts=8,
        top_k=2,
        rank=16,
        rounds=rounds,
        tokens=256,
        dtype="fp32",
    )
    for rounds in (1, 3)
}

TARGETS = [
    Target("inference, T=3", "folded", "literal", 1.7),
    # One round has nothing to fold, and both providers run the same code: what is left is the timing's noise.
    Target("inference, T=1", "folded", "literal", 0.95, " (no slower, within 5% of noise)"),
    Target("inference, T=3", "folded", "peer_mixlora", 3.0),
    Target("inference, T=1", "folded", "peer_mixlora", None),
    Target("training, T=3", "folded", "literal", None),
    Target("training, T=3", "folded", "peer_mixlora", None),
    Target("training, T=1", "folded", "literal", None),
    Target("training, T=1", "folded", "peer_mixlora", None),
]

REPLAY = Replay()


class Groups:
    """The cases measured so far; a case is measured with all its providers when the first of them is asked for."""

    def __init__(self, names: list[str], seconds: float) -> None:
        self.providers = {name: PROVIDERS[name] for name in names}
        self.seconds = seconds
        self.found: dict[Case, Group] = {}

    def __getitem__(self, case: Case) -> Group:
        if case not in self.found:
            self.found[case] = measure(case, self.providers, self.seconds)
        return self.found[case]


@pytest.fixture(scope="module")
def groups(
    pytestconfig: pytest.Config,
    provider_names: list[str],
    report: Callable[[str, list[Group], list[Target]], None],
) -> Iterator[Groups]:
    threads = torch.get_num_threads()
    torch.set_num_threads(pytestconfig.getoption("threads"))
    groups = Groups(provider_names, pytestconfig.getoption("seconds"))
    yield groups
    if groups.found:
        report("cpu", list(groups.found.values()), TARGETS)
    torch.set_num_threads(threads)


@pytest.mark.timeout(3600)  # a case's oracle, judging and turns all fall on its first test
@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("rounds", SIZES, ids="T{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_cpu(benchmark: BenchmarkFixture, groups: Groups, mode: str, rounds: int, provider: str) -> None:
    group = groups[Case(SIZES[rounds], mode)]
    if provider in group.refused:
        pytest.fail(f"{provider} is not timed, for it is wrong: {group.refused[provider]}", pytrace=False)
    timing = group.timings[provider]
    times = iter(timing.wall)
    benchmark.group = group.case.name
    benchmark.extra_info["cpu_median"] = timing.cpu_median
    benchmark.pedantic(REPLAY.advance, setup=lambda: ((next(times),), {}), rounds=len(timing.wall))
