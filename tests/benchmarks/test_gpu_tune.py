"""Tuning's own rules, without a GPU: the fastest right candidate wins, a wrong one never does."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch

from benchmarks import devices
from benchmarks.gpu import tune, tuning
from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.presets import PRESETS
from benchmarks.gpu.tuning import GAIN, Cell, choose, operator_of, rewrite, trying
from graphmoe_kernels.launching import CONFIGS, DEVICE_CLASSES, config_table

A, B, C, D = ({"BLOCK_M": 16, "num_warps": warps, "num_stages": 2} for warps in (1, 2, 4, 8))


def timer(times):
    def timed(configs):
        return [times[config["num_warps"]] for config in configs]

    return timed


def test_the_fastest_right_candidate_wins():
    found = choose(A, [B, C, D], lambda config: None, timer({1: 4.0, 2: 3.0, 4: 1.0, 8: 2.0}))
    assert found.config == C
    assert found.changed
    assert [config for config, _ in found.seconds] == [C, D, B, A]


def test_a_wrong_candidate_is_never_timed():
    """However fast it would be."""
    asked = []

    def timed(configs):
        asked.extend(configs)
        return [1.0 if config == B else 5.0 for config in configs]

    found = choose(A, [B], lambda config: "y: error 0.1" if config == B else None, timed)
    assert B not in asked
    assert found.config == A
    assert found.refused == [(B, "y: error 0.1")]


def test_a_winner_that_is_wrong_elsewhere_gives_way_to_the_next():
    """Right in the case that was timed is not enough: other dtypes and token counts are asked of the winner."""
    times = timer({1: 4.0, 2: 1.0, 4: 2.0})
    found = choose(A, [B, C], lambda config: None, times, lambda config: "fp16" if config == B else None)
    assert found.config == C
    assert found.refused == [(B, "fp16")]


def test_the_shipped_one_stays_unless_another_is_clearly_faster():
    """Noise must not rewrite files."""
    assert choose(A, [B], lambda config: None, timer({1: 1.0 * GAIN, 2: 1.001})).config == A
    assert choose(A, [B], lambda config: None, timer({1: 1.0, 2: 1.0})).changed is False


def test_a_wrong_shipped_one_is_replaced():
    found = choose(A, [B], lambda config: "spills" if config == A else None, timer({2: 9.0}))
    assert found.config == B


def test_without_anything_right_it_stays_as_it_was():
    found = choose(A, [B], lambda config: "wrong", timer({}))
    assert (found.config, found.changed, found.seconds) == (A, False, [])


def test_no_candidate_is_begun_after_the_time():
    answers = iter([True, False])
    found = choose(A, [B, C], lambda config: None, timer({1: 3.0, 2: 2.0, 4: 1.0}), time_left=lambda: next(answers))
    assert found.config == B


@pytest.mark.parametrize("device", DEVICE_CLASSES)
def test_every_configuration_that_is_shipped_can_be_tuned(device):
    """Files, names and candidates agree: the same block sizes, for each cell of each file."""
    shipped = {
        (operator, kernel, size, dtype)
        for operator in ("experts", "gru", "routing")
        for kernel, sizes in config_table(device, operator).items()
        for size, dtypes in sizes.items()
        for dtype in dtypes
    }
    assert set(tune.names()) == shipped
    for names in shipped:
        cell = Cell(*names)
        tried = candidates(*names)
        assert tried
        assert {frozenset(config) for config in tried} == {
            frozenset(config_table(device, names[0])[names[1]][names[2]][names[3]])
        }
        assert operator_of(cell).name in (cell.operator, "order")


def test_a_candidate_is_launched_while_it_is_tried_and_not_after():
    cell = Cell("gru", "gru_forward", "skinny", "half")
    table = config_table("sm_90", "gru")
    before = table["gru_forward"]["skinny"]["half"]
    with contextlib.suppress(RuntimeError), trying(cell, A, "sm_90"):
        assert table["gru_forward"]["skinny"]["half"] == A
        raise RuntimeError
    assert table["gru_forward"]["skinny"]["half"] == before


@pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)
def test_a_kernel_is_tuned_as_on_a_gpu(monkeypatch):
    """Check, time, confirm: the path of a GPU's run; a configuration that cannot be launched is refused."""
    monkeypatch.setattr(devices, "MIN_TURNS", 2)
    monkeypatch.setattr(tuning, "TOKENS", {"skinny": (3, 1)})
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    good = {"BLOCK_M": 16, "BLOCK_G": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(tuning, "candidates", lambda *names: [A, good])
    tuner = tuning.Tuner(Cell("gru", "gru_forward", "skinny", "float"), PRESETS["tiny"].at(1), devices.CpuDevice())
    before = dict(tuner.current)
    found = tuner.run(60)
    assert {json.dumps(config) for config, _ in found.seconds} == {json.dumps(before), json.dumps(good)}
    assert [config for config, _ in found.refused] == [A]
    assert tuner.current == before
    confirmed = tuner.confirmed(good)
    assert confirmed is None


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


def test_names_can_be_listed_and_narrowed(capsys):
    assert tune.main(["--list", "--kernel", "gru_forward wide"]) == 0
    assert capsys.readouterr().out.splitlines() == ["gru gru_forward wide half", "gru gru_forward wide float"]
    assert tune.main(["--kernel", "nonesuch"]) == 1
    assert "no kernel's name contains 'nonesuch'" in capsys.readouterr().err
