"""Kernels on their own, tried in Triton's interpreter: checked as a layer runs them, launched again, tuned."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import replace

import pytest
import torch

from benchmarks import devices, processes, tuning
from benchmarks.devices import CpuDevice
from benchmarks.document import _faults
from benchmarks.kernels import time_kernels
from benchmarks.layers import Layers
from benchmarks.measure import Workplace, measure
from benchmarks.operators import OPERATORS, check_operator, copies_of, find_operator, launches_of
from benchmarks.page import kernel_table
from benchmarks.sizes import MODELS
from benchmarks.table import PLANS, TINY_CHECKED, table
from benchmarks.tuning import GAIN, Cell, candidates, cells, operator_of, rewrite, trying
from graphmoe_kernels.launching import CONFIGS, DEVICE_CLASSES, config_table, recorded, stubbed
from tests.benchmarks.made_up import LIMITS, document

TINY = replace(TINY_CHECKED, dtype="fp32")
FEW, CPU = replace(TINY, tokens=3), torch.device("cpu")
GRU = find_operator("gru", True)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)


def test_operands_rotate_through_more_than_the_cache():
    """Operands that stay in the L2 cache would be timed at its speed."""
    operands = {"x": torch.zeros(1000)}
    few, many, too_few = (copies_of(operands, *each) for each in ((0,), (400_000,), (400_000, 3)))
    assert (len(few[0]), few[1]) == (2, True)
    assert len({own["x"].data_ptr() for own in many[0]}) * 4000 >= 600_000
    assert (many[1], too_few[1]) == (True, False)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.title)
def test_right_operators_pass_their_check(operator):
    """The check itself must not refuse what is right."""
    found = check_operator(operator, TINY, CPU)
    assert found.fault is None
    assert found.errors


def test_a_wrong_operator_is_refused_and_not_timed():
    """A kernel that is fast because it leaves something out gets no time."""

    def wrong(operands, top_k, backend):
        found = GRU.run(operands, top_k, backend)
        return {"out": found["out"] * (1 + 1e-3)} if backend == "triton" else found

    found, rows = time_kernels(GRU._replace(run=wrong), FEW, CpuDevice(), {"limits": LIMITS}, 0.0)
    assert rows == []
    assert found.fault.startswith("out: error 1.0e-03, the plain computation's own is ")


def test_kernels_are_launched_alone_as_the_operator_launched_them(monkeypatch):
    """Forward and backward kernels each have a row with the time of one launch of ten replays."""
    monkeypatch.setattr(devices, "MIN_TURNS", 2)
    found, rows = time_kernels(GRU, FEW, CpuDevice(), {"limits": LIMITS}, 0.0)
    assert found.fault is None
    assert [row["kernel"] for row in rows] == ["gru_forward", "gru_backward"]
    for row in rows:
        assert row["seconds"]["median"] > 0
        assert row["seconds"]["calls a turn"] == 10 * 2
        assert row["work"]["bytes"] > 0
        assert row["limits"]["matrix"] > 0


def test_a_launch_done_again_gives_the_same():
    """What is timed is the operator's own launch: the same arguments, the same result."""
    operands = GRU.operands(FEW, CPU)
    with recorded() as launches:
        out = GRU.run(operands, 2, "triton")["out"]
    expected = out.clone()
    out.zero_()
    launches[0].again()
    assert torch.equal(out, expected)
    assert {each.name for each in launches_of(GRU, FEW, operands)} == {"gru_forward", "gru_backward"}


# What no layer launches.
KEPT = ("routing_topk", "gru_forward_unaligned", "gru_backward_unaligned")
A, B, C, D = ({"BLOCK_M": 16, "num_warps": warps, "num_stages": 2} for warps in (1, 2, 4, 8))


@pytest.mark.parametrize(
    "tried, wrong, unconfirmed, times, chosen",
    [
        ([B, C, D], [], [], {1: 4.0, 2: 3.0, 4: 1.0, 8: 2.0}, C),
        ([B], [B], [], {1: 5.0}, A),  # what is wrong is never timed, however fast it would be
        ([B, C], [], [B], {1: 4.0, 2: 1.0, 4: 2.0}, C),  # other dtypes and token counts are asked of the winner
        ([B], [], [], {1: 1.0 * GAIN, 2: 1.001}, A),  # noise must not rewrite files
        ([B], [], [], {1: 1.0, 2: 1.0}, A),
        ([B], [A], [], {2: 9.0}, B),  # what is shipped is wrong
        ([B], [A, B], [], {}, A),  # nothing is right
    ],
)
def test_the_fastest_right_candidate_is_chosen_if_it_is_clearly_faster(tried, wrong, unconfirmed, times, chosen):
    """A configuration that leaves something out, or that wins by chance, must not be shipped."""

    class Made(tuning.Tuner):
        current = A

        def __init__(self):
            pass

        def fault(self, config):
            return "wrong" if config in wrong else None

        def timed(self, configs):
            return [times[config["num_warps"]] for config in configs]

        def confirmed(self, config):
            return "fp16" if config in unconfirmed else None

    found = Made().choose(tried, lambda: True)
    assert found.config == chosen
    assert found.refused == [*((config, "wrong") for config in wrong), *((config, "fp16") for config in unconfirmed)]
    assert [config["num_warps"] for config, _ in found.seconds] == sorted(times, key=times.get)
    if tried[0] not in wrong:  # no candidate is begun after the time
        assert [config for config, _ in Made().choose(tried, lambda: False).seconds] == [A][: A not in wrong]


@pytest.mark.parametrize("kernel", sorted({cell.kernel for cell in cells()}))
def test_a_cell_is_tuned_in_a_call_that_launches_its_kernel_with_what_is_tried(kernel):
    """What no call launches could not be timed, and what is launched otherwise would be timed for nothing."""
    for cell in cells():
        if cell.kernel == kernel:
            tuner = tuning.Tuner(cell, TINY, CpuDevice())
            sizes = replace(tuner.sizes, tokens=cell.tokens[0], dtype=tuning.DTYPES[cell.dtype][0])
            operands = tuner.operator.operands(sizes, CPU)
            with trying(cell, tuner.current | {"num_warps": 32}, tuner.device_class), stubbed():
                launches = launches_of(tuner.operator, sizes, operands)
            assert {each.options["num_warps"] for each in launches if each.name == tuner.kernel} == {32}, cell.name


@pytest.mark.parametrize("device", DEVICE_CLASSES)
def test_every_configuration_that_is_shipped_can_be_tuned(device):
    """For each cell of each file there is an operator to call, and there are candidates that differ from it."""
    shipped = {
        (operator, kernel, size, dtype)
        for operator in ("experts", "gru", "routing")
        for kernel, sizes in config_table(device, operator).items()
        for size, dtypes in sizes.items()
        for dtype in dtypes
    }
    assert {kernel for _, kernel, *_ in shipped - set(cells())} <= {*KEPT}
    assert set(cells()) <= shipped
    for names in cells():
        current = config_table(device, names[0])[names[1]][names[2]][names[3]]
        tried = candidates(current)
        assert current not in tried
        assert {frozenset(config) for config in tried} == {frozenset(current)}
        assert sum(tried[0][name] != current[name] for name in current) == 1
        assert operator_of(Cell(*names)).name == names[0]


def test_a_candidate_is_launched_while_it_is_tried_and_not_after():
    cell = Cell("gru", "gru_forward", "skinny", "half")
    table = config_table("sm_90", "gru")
    before = table["gru_forward"]["skinny"]["half"]
    with contextlib.suppress(RuntimeError), trying(cell, A, "sm_90"):
        assert table["gru_forward"]["skinny"]["half"] == A
        raise RuntimeError
    assert table["gru_forward"]["skinny"]["half"] == before


def test_a_kernel_is_tuned_as_on_a_gpu(monkeypatch):
    """Check, time, confirm: the path of a GPU's run; a configuration that cannot be launched is refused."""
    monkeypatch.setattr(devices, "MIN_TURNS", 2)
    monkeypatch.setattr(tuning, "TOKENS", {"skinny": (3, 1)})
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    good = {"BLOCK_M": 16, "BLOCK_G": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    tuner = tuning.Tuner(Cell("gru", "gru_forward", "skinny", "float"), FEW, CpuDevice())
    before = dict(tuner.current)
    found = tuner.choose([A, good], lambda: True)
    assert {json.dumps(config) for config, _ in found.seconds} == {json.dumps(before), json.dumps(good)}
    assert [config for config, _ in found.refused] == [A]
    assert tuner.current == before
    assert tuner.confirmed(good) is None


def test_candidates_are_launched_elsewhere_first(monkeypatch):
    """On a GPU other processes compile them, and what cannot be launched is neither checked nor timed."""
    cell, good = Cell("gru", "gru_forward", "skinny", "float"), {"BLOCK_M": 16, "BLOCK_G": 16, "BLOCK_K": 16}
    good |= {"num_warps": 4, "num_stages": 2}
    chosen = []
    monkeypatch.setattr(tuning, "CudaDevice", CpuDevice)
    monkeypatch.setattr(tuning, "TOKENS", {"skinny": (3, 1)})
    monkeypatch.setattr(tuning, "candidates", lambda shipped: [A, good])
    monkeypatch.setattr(tuning, "results", lambda function, calls, lost: [function(*each) for each in calls])
    monkeypatch.setattr(
        tuning.Tuner, "choose", lambda self, tried, left: chosen.append(tried) or tuning.Choice(self.current, [], [])
    )
    rows = tuning.tune(cell, FEW, CpuDevice(), 60.0)
    assert chosen == [[good]]
    assert [row["config"] for row in rows] == [A]
    assert "BLOCK_G" in rows[0]["refused"]


def test_processes_give_what_they_can():
    """One that dies of a call, as of a kernel, does not take the run with it."""
    assert processes.results(math.sqrt, [(4,), (9,)], lost=None) == [2.0, 3.0]
    assert processes.results(os._exit, [(1,)], lost="lost") == ["lost"]
    assert processes.results(math.sqrt, [(16,)], lost=None) == [4.0]
    with pytest.raises(TypeError, match="real number"):
        processes.results(math.sqrt, [("x",)], lost=None)


def test_rewriting_changes_one_entry(tmp_path):
    """And writes a file of the same form, so that a difference shows what was tuned."""
    original = CONFIGS / "sm_90" / "gru.json"
    target = tmp_path / "sm_90" / "gru.json"
    target.parent.mkdir()
    target.write_text(original.read_text())
    cell = Cell("gru", "gru_forward", "wide", "half")
    rewrite(tmp_path, "sm_90", cell, json.loads(original.read_text())["gru_forward"]["wide"]["half"])
    assert target.read_text() == original.read_text()
    rewrite(tmp_path, "sm_90", cell, A)
    expected = json.loads(original.read_text())
    expected["gru_forward"]["wide"]["half"] = A
    assert json.loads(target.read_text()) == expected


def test_tuning_is_a_case_of_the_runner(monkeypatch):
    """It rewrites the file of what wins, and leaves every candidate's time or fault in the result."""
    written = []
    monkeypatch.setattr(tuning, "rewrite", lambda folder, device, cell, config: written.append((device, cell, config)))
    chosen = tuning.Choice(B, [(B, 1e-6), (A, 2e-6)], [(C, "wrong")])
    monkeypatch.setattr(tuning.Tuner, "choose", lambda self, tried, time_left: chosen)
    case = next(case for case in table(MODELS["tiny"], "cpu", "fp32", PLANS["cpu"]) if case.group == "tune")
    found = measure(case, Workplace(Layers(CpuDevice()), {"limits": {}}, 0.0))
    assert written == [("sm_90", Cell(*case.operator.split()), B)]
    assert [row.get("chosen") for row in found.kernels] == [True, False, None]
    assert list(_faults(document(kernels=found.kernels))) == []
    text = "\n".join(line[0] for line in kernel_table(found.kernels)[1])
    assert "chosen: BLOCK_M=16 num_warps=2" in text
    assert "refused: wrong: BLOCK_M=16 num_warps=4" in text
