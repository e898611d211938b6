"""The benchmarks' own rules, at small sizes: only what is right is timed, in turns, reported with its conditions."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure as measuring
from benchmarks.cases import GROUPS, Case, Contender
from benchmarks.checks import Judge, verdict
from benchmarks.devices import MIN_TURNS, CpuDevice, Samples
from benchmarks.layers import Layer, Layers, over_tokens
from benchmarks.measure import Workplace
from benchmarks.plain import plain_literal
from benchmarks.providers import PROVIDERS, missing
from benchmarks.sizes import MODELS
from benchmarks.table import PLANS, Plan, table
from benchmarks.test_benchmarks import Replay
from benchmarks.timing import INPUTS, LayerTiming
from benchmarks.whole import DecoderTiming
from tests.benchmarks.made_up import LIMITS

TINY = MODELS["tiny"]
PLAN = Plan((1,), (5, 12), batch=2, context=3, whole_layers=1, prompt=4, new_tokens=2, profiled=(4, 8))
CPU = CpuDevice()
# Groups whose cases are not contenders in turns; they have tests of their own.
NOT_IN_TURNS = ("check", "kernels", "profile", "host", "tune")
HERE = [
    name
    for name in PROVIDERS
    if name not in missing(PROVIDERS, CPU) and name != "literal_compiled" and "triton" not in name
]


pytestmark = pytest.mark.usefixtures("quick")


def workplace():
    return Workplace(Layers(CPU), {"limits": LIMITS}, 0.0)


def cases(group, kind="cpu"):
    return [case for case in table(TINY, kind, "fp32", PLAN) if case.group == group]


def side_by_side(*providers, tokens=12, **changes):
    contenders = tuple(Contender(provider, TINY.sizes(tokens, 3, "fp32"), provider) for provider in providers)
    return Case("layer", TINY, "inference", contenders, **changes)


def judged(rounds, training):
    """A layer, its literal loop and who judges it."""
    sizes = TINY.sizes(12, rounds, "fp32")
    layer = Layer(sizes, CPU)
    x, rows = layer.input(sizes)
    return layer, PROVIDERS["literal"].build(layer, sizes), Judge({"x": x}, rows, training, torch.float32)


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in NOT_IN_TURNS])
def test_every_provider_of_every_case_passes_its_check(group):
    """A comparison with a baseline that computes something else is worth nothing; nor is a check that refuses it."""
    place = workplace()
    for case in cases(group):
        case = case.keep(HERE)
        found = measuring.measure(case, place)
        assert [check["fault"] for check in found.checks] == [None] * len(case.contenders), case.name
        assert [row["label"] for row in found.rows] == [contender.label for contender in case.contenders]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_cases_and_contenders_have_names_of_their_own(kind):
    """Two of one name would overwrite each other in a result; the second would look measured."""
    for model in MODELS.values():
        found = list(table(model, kind, "bf16", PLANS[kind]))
        assert len({case.name for case in found}) == len(found)
        assert {case.group for case in found} == set(GROUPS)
        for case in found:
            assert len({contender.label for contender in case.contenders}) == len(case.contenders)


def test_a_wrong_provider_gets_no_time(monkeypatch):
    """Whatever is faster by leaving something out must not get a time, and must not cost the others theirs."""
    right = PROVIDERS["literal"]

    def build(layer, sizes):
        built = right.build(layer, sizes)
        forward = built.subject.run
        wrong = built.subject._replace(run=lambda given: {"y": forward(given)["y"] * (1 + 1e-4)})
        return built._replace(subject=wrong)

    def raising(layer, sizes):
        raise RuntimeError("no such path\nmore")

    monkeypatch.setitem(PROVIDERS, "torch", PROVIDERS["torch"]._replace(build=build))
    monkeypatch.setitem(PROVIDERS, "dense", PROVIDERS["dense"]._replace(build=raising))
    found = measuring.measure(side_by_side("torch", "literal", "dense"), workplace())
    assert [row["label"] for row in found.rows] == ["literal"]
    assert found.fault("torch").startswith("y: error 1.0e-04, the plain computation's own is ")
    assert found.fault("dense") == "RuntimeError: no such path"
    assert found.fault("literal") is None


def test_a_wrong_gradient_is_refused():
    """A training step is its gradients: a right output alone does not earn a time."""
    _, built, judge = judged(3, True)

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 0.5

    assert judge.check(built).fault is None
    forward = built.subject.run
    wrong = built.subject._replace(run=lambda given: {"y": Halved.apply(forward(given)["y"])})
    verdict = judge.check(built._replace(subject=wrong))
    assert verdict.errors["y"][0] < 1e-5
    assert "d_x: error 5.0e-01" in verdict.fault
    assert "d_gru.update: error 5.0e-01" in verdict.fault


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
def test_what_is_compiled_computes_the_layer(rounds, training):
    """The compiled baseline has to be the layer before a compiler touches it; compiling takes too long for a test."""
    layer, built, judge = judged(rounds, training)
    sizes = TINY.sizes(12, rounds, "fp32")
    subject = over_tokens(plain_literal(layer.weights(sizes), layer.spec(sizes)), built.subject.shared)
    assert judge.check(built._replace(subject=subject, module=None)).fault is None


def test_a_graph_holds_those_that_can_be_captured_and_the_row_says_so():
    """A baseline that asks the device something cannot be captured: it runs as it can, and is not called a graph."""

    class Capturing(CpuDevice):
        graphs = True

    case = side_by_side("dense", "peer_mixlora", tokens=1, graph=True)
    found = measuring.measure(case, Workplace(Layers(Capturing()), {"limits": {}}, 0.0))
    assert {row["provider"]: row["graph"] for row in found.rows} == {"dense": True, "peer_mixlora": False}


def test_a_graph_that_replays_another_result_is_refused(monkeypatch):
    """A capture can go wrong where the call itself is right: what is timed is what has to be right."""

    class Replaying(CpuDevice):
        graphs = True

        def capture(self, call):
            y = call()["y"]
            return lambda: {"y": y * 1.01}

    case = side_by_side("dense", tokens=1, graph=True)
    found = measuring.measure(case, Workplace(Layers(Replaying()), {"limits": {}}, 0.0))
    assert found.rows == []
    assert "in a CUDA graph, y: error 1.0e-02" in found.fault("dense")


def test_steps_are_checked_without_dropout_and_timed_with_it():
    """A definition has no masks, so a check with them would refuse everyone; a step without them is another step."""
    (case,) = cases("step")
    timing = LayerTiming(case, Layers(CPU))
    for contender in case.contenders:
        ready = timing.prepare(contender)
        assert ready.check().fault is None
        calls = [ready.call() for _ in range(2 * INPUTS)]  # each input twice
        alike = [torch.equal(calls[i]["y"], calls[i + INPUTS]["y"]) for i in range(INPUTS)]
        assert alike == [contender.provider == "dense"] * INPUTS


def test_a_check_of_nothing_passes_nobody():
    """With no sampled token there is nothing to differ in: that must not read as right."""
    none = {"y": torch.empty(0, 4)}
    assert verdict(none, none, none, torch.float32).fault == "y has no elements to compare"


def test_the_decoder_check_is_not_dazzled_by_the_residual():
    """The residual is much of a decoder layer's output: an error of the MLP has to show all the same."""
    case = next(case for case in cases("decoder") if case.mode == "prefill").keep(["literal"])
    timing = DecoderTiming(case, Layers(CPU))
    prepared = timing.prepare(case.contenders[0])
    assert prepared.check().fault is None
    y = prepared.call()
    off = timing.residual.view(y.shape) + (y - timing.residual.view(y.shape)) * (1 + 1e-4)
    built = PROVIDERS["literal"].build(timing.layers.get(case.sizes), case.sizes)
    assert timing.compare(built, y).fault is None
    assert "added by the MLP: error 1.0e-04" in timing.compare(built, off).fault


def test_calls_take_turns(monkeypatch):
    """Interleaved, every provider once a turn: a disturbance of the machine falls on all alike."""
    monkeypatch.setattr("benchmarks.devices.MIN_TURNS", MIN_TURNS)
    called = []
    found = CPU.in_turns({name: lambda name=name: called.append(name) for name in "abc"}, seconds=0)
    turns = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(turns) == MIN_TURNS
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert all(len(t.seconds) == MIN_TURNS for t in found.values())


def test_time_is_what_the_clock_says():
    """Samples are seconds of the clock, all of a call, each once a turn."""
    clock = Replay()
    calls = {"short": lambda: clock.advance(0.5), "long": lambda: clock.advance(2.0)}
    timed = CpuDevice(clock).in_turns(calls, 0.0)
    assert timed["short"].summary()["median"] == pytest.approx(0.5)
    assert timed["long"].summary()["best"] == pytest.approx(2.0)


def test_ratios_are_taken_turn_by_turn():
    """A machine that slows down for a turn slows both: their ratio stays, and so does its spread."""
    mine, its = Samples([2.0, 20.0, 2.2]), Samples([1.0, 10.0, 1.1])
    assert mine.over(its) == {"median": pytest.approx(2.0), "range": [pytest.approx(2.0)] * 2}
    assert mine.summary()["quartiles"] == [pytest.approx(2.1), pytest.approx(11.1)]


def test_ratios_are_of_one_call_each(monkeypatch):
    """A short call is repeated within a turn and a long one less often: their ratio is still that of one call each."""
    clock = Replay()

    def taking(provider, seconds):
        def build(layer, sizes):
            built = provider.build(layer, sizes)
            run = built.subject.run
            timed = built.subject._replace(run=lambda given: (clock.advance(seconds), run(given))[1])
            return built._replace(subject=timed)

        return provider._replace(build=build)

    for name, seconds in (("dense", 1.0), ("literal", 3.0)):
        monkeypatch.setitem(PROVIDERS, name, taking(PROVIDERS[name], seconds))
    monkeypatch.setattr(measuring, "SHORTEST_TURN", 6.0)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=clock))
    place = Workplace(Layers(CpuDevice(clock)), {"limits": {}}, 0.0)
    dense, literal = measuring.measure(side_by_side("dense", "literal", tokens=1), place).rows
    assert (dense["seconds"]["calls a turn"], literal["seconds"]["calls a turn"]) == (6, 2)
    assert literal["ratios"]["dense"]["median"] == pytest.approx(3.0)


def test_rows_say_what_was_measured_and_what_the_limit_is():
    """A figure without sizes, spread and limit cannot be judged."""
    (row,) = measuring.measure(side_by_side("torch"), workplace()).rows
    assert row["sizes"] == dataclasses.asdict(TINY.sizes(12, 3, "fp32"))
    assert (row["group"], row["model"], row["mode"], row["graph"]) == ("layer", "tiny", "inference", False)
    assert row["peak bytes"] > 0
    assert row["share"] == pytest.approx(max(row["limit"].values()) / row["seconds"]["median"])
    (dense,) = measuring.measure(side_by_side("dense"), workplace()).rows
    assert dense["sizes"]["rounds"] == 1


def test_peak_memory_is_what_is_held_at_once():
    """Two tensors of 4 MB live together, then one: the peak is 8 MB, whatever was allocated over time."""

    def call():
        a = torch.empty(1000, 1000)
        for _ in range(5):
            a = a + 1

    assert CPU.peak_bytes(call) == pytest.approx(8e6, rel=0.01)
