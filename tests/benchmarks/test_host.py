"""The host's time: measured without a GPU and without the interpreter, and split among the parts that spend it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import host, host_profile
from benchmarks.devices import CpuDevice
from benchmarks.layers import Layers
from benchmarks.measure import Workplace, measure
from benchmarks.sizes import MODELS
from benchmarks.table import PLANS, table

CASES = [case for case in table(MODELS["tiny"], "cpu", "fp32", PLANS["cpu"]) if case.group == "host"]
TRITON = "launches stubbed", "host-triton"


pytestmark = pytest.mark.usefixtures("quick")


def found(mode, model, keep=None):
    case = next(case for case in CASES if (case.mode, case.model.name) == (mode, model))
    case = case._replace(contenders=tuple(c for c in case.contenders if keep is None or c.label in keep))
    return measure(case, Workplace(Layers(CpuDevice()), {"limits": {}}, 0.0))


def test_the_cases_are_those_that_the_targets_are_about():
    """One token: a layer on PyTorch and on Triton at T = 1 and 3 beside the MLP, and generate beside plain LoRA."""
    labels = {(case.mode, case.model.name): [c.label for c in case.contenders] for case in CASES}
    assert labels["inference", "host"] == ["dense", "torch, T=1", "torch, T=3"]
    assert set(labels["generate", "host"]) >= {"peft_lora", "torch, T=3"}
    ways = {f"triton_{way}, T={rounds}" for way in ("bound", "unlaunched") for rounds in (1, 3)}
    assert set(labels[TRITON]) == {"dense", *ways}
    assert all(case.contenders[0].sizes.tokens == 1 for case in CASES)


def test_a_layer_is_checked_and_timed_by_one_thread_of_this_process(monkeypatch):
    """Other programs' time, or a second thread that spins, would pass for the layer's."""
    seen = []
    run = CpuDevice.in_turns

    def in_turns(self, calls, seconds):
        seen.append((self.clock.__name__, torch.get_num_threads()))
        return run(self, calls, seconds)

    monkeypatch.setattr(CpuDevice, "in_turns", in_turns)
    torch.set_num_threads(2)
    try:
        of_case = found("inference", "host")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [("process_time", 1)]
    assert all(check["passed"] for check in of_case.checks)
    assert [row["label"] for row in of_case.rows] == ["dense", "torch, T=1", "torch, T=3"]


def test_the_triton_path_is_timed_without_a_gpu_and_without_the_interpreter():
    """The tests' own process interprets kernels, which binds nothing; what it measured would be the interpreter's.

    What nobody computed is not checked, and does not read as if it had passed.
    """
    pytest.importorskip("triton")
    of_case = found(*TRITON, {"dense", "triton_bound, T=1", "triton_unlaunched, T=1"})
    best = {row["label"]: row["seconds"]["best"] for row in of_case.rows}
    assert 0 < best["dense"] < best["triton_unlaunched, T=1"] < best["triton_bound, T=1"]
    assert [check["label"] for check in of_case.checks] == ["dense"]


def test_a_process_that_fails_says_why():
    with pytest.raises(ValueError, match=r"invalid literal for int.*'no layer'"):
        host.in_own_process(int, "no layer")


def test_the_parts_of_a_call_are_named_and_sum_to_it():
    """A layer's call on PyTorch spends time in every part, and little elsewhere."""
    (profile,) = found("profile", "host", {"torch, T=3"}).profiles
    assert (profile["phase"], profile["adapter"]) == ("host", "T=3, torch")
    assert set(profile["seconds"]) == set(host_profile.PARTS)
    for part in ("the layer's door", "freshness of the fold", "rounds", "routing", "experts", "GRU", "products"):
        assert profile["seconds"][part] > 0, part
    assert profile["seconds"]["other"] < 0.2 * sum(profile["seconds"].values())


def test_what_belongs_to_no_part_counts_for_who_called_it():
    """PyTorch's own functions are most of the calls: left alone they would hide who made them."""
    route, torch_function = ("/x/graphmoe_kernels/routing/run.py", 1, "route"), ("/torch/f.py", 1, "f")
    softmax, linear = ("~", 0, "<built-in method torch.softmax>"), ("~", 0, "<built-in method torch._C._nn.linear>")
    stats = {
        route: (1, 1, 1.0, 10.0, {}),
        torch_function: (1, 1, 2.0, 3.0, {route: (1, 1, 2.0, 3.0)}),
        softmax: (1, 1, 1.0, 1.0, {torch_function: (1, 1, 1.0, 1.0)}),
        linear: (1, 1, 4.0, 4.0, {route: (1, 1, 4.0, 4.0)}),
    }
    shares = {name: share for name, share in host_profile.shares(stats).items() if share}
    assert shares == {"routing": pytest.approx(0.5), "products": pytest.approx(0.5)}
