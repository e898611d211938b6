"""The benchmarks' own rules, at small sizes: only what is right is timed, in turns, reported with its conditions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import results, timing
from benchmarks.cases import Case
from benchmarks.groups import Group, measure
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.results import Target
from benchmarks.timing import MIN_TURNS, Timing, in_turns
from graphmoe_kernels.cost import Sizes

SIZES = Sizes(hidden=48, intermediate=112, gru_width=5, experts=5, top_k=2, rank=4, tokens=40, dtype="fp32")


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_provider_computes_the_layer(mode, rounds):
    """A comparison with a baseline that computes something else is worth nothing."""
    group = measure(Case(replace(SIZES, rounds=rounds), mode), PROVIDERS, seconds=0)
    assert group.refused == {}
    assert group.timings.keys() == PROVIDERS.keys()


def test_a_wrong_provider_is_refused_with_its_error():
    """Whatever is faster by leaving something out must not get a time."""

    def prepare(weights, spec):
        right = PROVIDERS["literal"].prepare(weights, spec)
        return lambda x: right(x) * (1 + 1e-4)

    providers = {"wrong": Provider("wrong", "off by 1e-4", prepare), "literal": PROVIDERS["literal"]}
    group = measure(Case(SIZES, "inference"), providers, seconds=0)
    assert group.timings.keys() == {"literal"}
    assert group.refused["wrong"].startswith("y: error 1.0e-04, the plain computation's own is ")


def test_a_wrong_gradient_is_refused():
    """A training step is its gradients: a right output alone does not earn a time."""

    def prepare(weights, spec):
        detached = weights._replace(router=weights.router.detach().requires_grad_())
        right, half = (PROVIDERS["literal"].prepare(w, spec) for w in (weights, detached))
        return lambda x: (right(x) + half(x)) / 2

    group = measure(Case(SIZES, "training"), {"wrong": Provider("wrong", "half the router's", prepare)}, seconds=0)
    assert group.timings == {}
    assert group.refused["wrong"].startswith("router: error 5.0e-01")


def test_calls_take_turns():
    """Interleaved, every provider once a turn: a disturbance of the machine falls on all alike."""
    called = []
    found = in_turns({name: lambda name=name: called.append(name) for name in "abc"}, seconds=0)
    turns = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(turns) == MIN_TURNS
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert all(len(t.wall) == len(t.cpu) == MIN_TURNS for t in found.values())


def test_targets_are_ratios_of_medians_and_results_name_their_conditions(tmp_path):
    """A figure without device, versions, commit and date cannot be judged later."""
    case = Case(SIZES, "inference")
    timings = {"folded": Timing([1.0, 1.0, 9.0], [1.0] * 3), "literal": Timing([2.0, 2.0, 2.0], [3.0] * 3)}
    groups = [Group(case, timings, {"peer_mixlora": "y is missing"})]
    targets = [
        Target("inference, T=3", "folded", "literal", 1.7),
        Target("inference, T=3", "folded", "literal", 2.5),
        Target("inference, T=3", "folded", "peer_mixlora", 3.0),  # refused: there is no ratio to report
    ]
    measured = results.ratios(groups, targets)
    assert [(r.wall, r.best, r.cpu, r.verdict) for r in measured] == [(2, 2, 3, "met"), (2, 2, 3, "missed")]

    conditions = results.conditions("cpu", load=0.5)
    path = results.save(tmp_path, conditions, groups, measured)
    content = json.loads(path.read_text())
    assert path.name.startswith("cpu-")
    assert content["device"]["threads"] == torch.get_num_threads()
    assert content["versions"]["torch"] == torch.__version__
    assert content["commit"]
    assert content["date"]
    assert content["groups"][0]["seconds"]["folded"]["median"] == 1.0
    assert content["groups"][0]["refused"] == {"peer_mixlora": "y is missing"}
    text = results.describe(conditions, groups, measured)
    assert "inference, T=3: folded over literal" in text
    assert "missed" in text


def test_replay_gives_a_runner_the_recorded_times():
    """pytest-benchmark's tables must show what was measured in turns, not the time of playing it back."""
    clock = timing.Replay()
    before = clock()
    clock.advance(0.25)
    assert clock() - before == 0.25
