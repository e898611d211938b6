"""Who the GPU report times, tried without a GPU: what is right passes its check, what is wrong gets no time."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import devices
from benchmarks.checks import check_operator
from benchmarks.devices import CpuDevice
from benchmarks.gpu.kernels import time_kernels
from benchmarks.gpu.presets import PRESETS
from benchmarks.limits import H200
from benchmarks.operators import OPERATORS
from graphmoe_kernels.launching import recorded

TINY = PRESETS["tiny"]
GRU = next(operator for operator in OPERATORS if operator.name == "gru" and operator.later)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)


@interpreted
@pytest.mark.parametrize("operator", [o for o in OPERATORS if o.name != "experts"], ids=lambda o: o.title)
def test_right_operators_pass_their_check(operator):
    """The check itself must not refuse what is right."""
    operands = operator.operands(TINY.test, operator.later, torch.float32, torch.device("cpu"))
    found = check_operator(operator, operands, torch.float32)
    assert found.fault is None
    assert operator.name == "order" or found.errors


@interpreted
def test_a_wrong_operator_is_refused_and_not_timed():
    """A kernel that is fast because it leaves something out gets no time."""

    def wrong(operands, backend):
        found = GRU.run(operands, backend)
        return {"out": found["out"] * (1 + 1e-3)} if backend == "triton" else found

    found, rows = time_kernels(GRU._replace(run=wrong), TINY.at(3), CpuDevice(), torch.float32, H200, 0.0)
    assert rows == []
    assert found.fault.startswith("out: error 1.0e-03, the plain computation's own is ")


@interpreted
def test_a_wrong_order_is_refused():
    """An order that is no permutation by experts would be timed for nothing."""
    order = next(operator for operator in OPERATORS if operator.name == "order")
    operands = order.operands(TINY.at(40), False, torch.float32, torch.device("cpu"))
    wrong = order._replace(
        run=lambda operands, backend: {"order": torch.arange(40) if backend == "triton" else torch.zeros(40)}
    )
    assert "stable sort" in check_operator(wrong, operands, torch.float32).fault


@interpreted
def test_kernels_are_launched_alone_as_the_operator_launched_them(monkeypatch):
    """Forward and backward kernels each have a row with their work, limits and time a call."""
    monkeypatch.setattr(devices, "MIN_TURNS", 2)
    found, rows = time_kernels(GRU, TINY.at(3), CpuDevice(), torch.float32, H200, 0.0)
    assert found.fault is None
    assert [row["kernel"] for row in rows] == ["gru_forward", "gru_backward", "operator forward", "operator forward"]
    assert [row.get("backend") for row in rows[2:]] == ["triton", "torch"]
    for row in rows[:2]:
        assert row["seconds"]["median"] > 0
        assert set(row["limits"]) == {"memory", "L2", "matrix", "integer"}


@interpreted
def test_a_launch_done_again_gives_the_same():
    """What is timed is the operator's own launch: the same arguments, the same result."""
    operands = GRU.operands(TINY.at(3), True, torch.float32, torch.device("cpu"))
    with recorded() as launches:
        out = GRU.run(operands, "triton")["out"]
    expected = out.clone()
    out.zero_()
    launches[0].again()
    assert torch.equal(out, expected)
