"""The GPU report's own rules, tried without a GPU: what is wrong gets no time, and what was found is never lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import devices
from benchmarks.cases import table
from benchmarks.devices import CpuDevice
from benchmarks.document import Document
from benchmarks.gpu import plan, report
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.plan import DeviceLost, Run, Step, run_steps, steps
from benchmarks.gpu.presets import PRESETS
from benchmarks.operator_timing import copies_for

ROOT = Path(__file__).resolve().parents[2]
TINY = PRESETS["tiny"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tries what happens without a CUDA device")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"
)


def test_operands_rotate_through_more_than_the_cache():
    """Operands that stay in the L2 cache would be timed at its speed."""
    operands = {"x": torch.zeros(1000)}
    assert copies_for(operands, l2_bytes=0) == 2
    assert copies_for(operands, l2_bytes=400_000) * 4000 >= 600_000


class FakeClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def new_run(path, minutes=1.0, clock=None):
    return Run(TINY, CpuDevice(), Document(path), Budget(60 * minutes, clock or FakeClock()))


@no_gpu
@pytest.mark.parametrize("module", ["report", "tune"])
def test_without_a_gpu_it_says_so_and_fails(module):
    """One sentence and an exit code: no traceback, no report that looks like one."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{module}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert found.stdout == ""
    assert "needs a CUDA device, and there is none" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_what_no_time_is_left_for_is_skipped_and_named(tmp_path):
    """The budget is hard: a step begins only if it can end in time, and later smaller ones still may."""
    clock, ran = FakeClock(), []

    def step(name, seconds):
        def work(run):
            ran.append(name)
            clock.now += seconds

        return Step(name, seconds, work)

    run = new_run(tmp_path / "r.json", 1.0, clock)
    run_steps(run, [step("first", 40), step("large", 30), step("small", 15)], say=lambda line: None)
    assert ran == ["first", "small"]
    states = {name: found["state"] for name, found in json.loads((tmp_path / "r.json").read_text())["steps"].items()}
    assert states == {"first": "done", "large": "skipped", "small": "done"}


def test_a_failing_step_is_recorded_and_the_rest_goes_on(tmp_path):
    """One broken case must not cost the others."""

    def fail(run):
        raise ValueError("wrong shape")

    run = new_run(tmp_path / "r.json")
    run_steps(run, [Step("bad", 1, fail), Step("good", 1, lambda run: None)], say=lambda line: None)
    found = run.document.content["steps"]
    assert found["bad"]["state"] == "failed"
    assert "ValueError: wrong shape" in found["bad"]["note"]
    assert found["good"]["state"] == "done"


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on(tmp_path):
    """After an illegal address nothing more can run in that process: the next one passes over the step."""

    def lose(run):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path, ran = tmp_path / "r.json", []
    todo = [Step("bad", 1, lose), Step("good", 1, lambda run: ran.append("good"))]
    with pytest.raises(DeviceLost):
        run_steps(new_run(path), todo, say=lambda line: None)
    assert ran == []
    run_steps(new_run(path), todo, say=lambda line: None)
    assert ran == ["good"]
    assert Document(path).content["steps"]["bad"]["state"] == "failed"


def test_a_killed_process_leaves_a_whole_file(tmp_path):
    """The step that was running is known to the next process, which does not run into it again."""
    document = Document(tmp_path / "r.json")
    document.content["kernels"].append({"kernel": "k"})
    document.begin("hangs")
    again = Document(tmp_path / "r.json")
    assert again.content["kernels"] == [{"kernel": "k"}]
    assert again.attempted("hangs")
    assert again.close_interrupted() == ["hangs"]
    assert again.content["steps"]["hangs"]["state"] == "failed"


def test_a_hanging_process_is_ended(tmp_path, monkeypatch):
    """A kernel that never returns must not take the whole lease with it."""
    monkeypatch.setattr(report, "STUCK_SECONDS", 0.5)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert report._wait(process, tmp_path / "none.json", end=report.time.monotonic() + 60) is None
    assert process.poll() is not None


def test_a_process_that_gets_nowhere_is_not_started_for_ever(tmp_path, monkeypatch, capfd):
    """A broken installation ends the run at once, with a page that says how far it came."""
    monkeypatch.setattr(report.sys, "executable", "/bin/false")
    options = report.parser().parse_args(["--device", "cpu", "--sizes", "tiny"])
    report.supervise(options, tmp_path / "r.json", seconds=60)
    assert "ended with 1 before it began another step" in capfd.readouterr().err
    assert report.finish(tmp_path / "r.json") == 1


def test_the_plan_names_every_step_once_and_starts_with_what_matters():
    """A step's name is how a second process knows that it has run; two alike would hide one."""
    for preset in PRESETS.values():
        for kind in ("cpu", "cuda"):
            names = [step.name for step in steps(preset, kind)]
            assert len(names) == len(set(names))
    preset = PRESETS["llama-3-8b"]
    names = [step.name for step in steps(preset, "cuda")]
    assert names[0] == "limits"
    first_layer = next(i for i, name in enumerate(names) if name.startswith("layer"))
    assert all(name.startswith("check") for name in names[1:first_layer])
    assert names[first_layer] == "layer, llama-3-8b, inference, 8192 tokens, T=3, n=8, bf16"
    assert {case.name for case in table(preset.model, "cuda", "bf16", preset.plan)} <= set(names)


def test_every_case_of_the_plan_runs_and_a_skipped_one_says_why(tmp_path, monkeypatch):
    """A case that cannot run costs its own step alone; what was measured is in the document."""
    monkeypatch.setattr(devices, "MIN_TURNS", 2)
    run = new_run(tmp_path / "r.json")
    cases = {case.name: case for case in table(TINY.model, "cpu", "fp32", TINY.plan)}
    names = [name for name in cases if name.startswith(("rounds", "gru_step", "decoder")) and "training" not in name]
    plan = [step for step in steps(TINY, "cpu") if step.name in (*names, "limits")]
    run_steps(run, plan[:-1], say=lambda line: None)
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda self: 1)
    run_steps(run, plan, say=lambda line: None)
    found = json.loads((tmp_path / "r.json").read_text())
    assert {row["case"] for row in found["rows"]} == {step.name for step in plan[1:-1]}
    assert all(check["passed"] for check in found["checks"])
    assert found["steps"][plan[-1].name]["state"] == "skipped"
    assert "of memory" in found["steps"][plan[-1].name]["note"]
    assert found["conditions"]["left out"].keys() >= {"liger", "mixlora"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--minutes", "0"], "--minutes must be at least 1, got 0"),
        (["--only", "nothinglike"], "--only 'nothinglike' is in no step's name; the steps are:"),
        (["--file", __file__], "is no JSON"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(arguments, message, tmp_path, capsys, monkeypatch):
    """A page without a figure, or a traceback, is no answer."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    with pytest.raises(SystemExit) as error:
        report.main(["--device", "cpu", "--sizes", "tiny", "--out", str(tmp_path), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@interpreted
def test_the_whole_command_on_the_cpu(tmp_path):
    """The path that a GPU run takes: the two processes, limits, checks, kernels, a layer, JSON, Markdown, exit code."""
    command = [sys.executable, "-m", "benchmarks.gpu.report", "--device", "cpu", "--sizes", "tiny"]
    command += ["--out", str(tmp_path), "--minutes", "2", "--commit", "abc"]
    command += [
        "--only",
        "check gru",
        "--only",
        "kernels of order",
        "--only",
        "layer, tiny, inference, 1 tokens, T=1",
    ]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 0, found.stdout + found.stderr
    (path,) = tmp_path.glob("cpu-*.json")
    content = json.loads(path.read_text())
    assert content["conditions"]["commit"] == "abc"
    assert content["limits"]["copy bytes a second"] > 0
    assert {row["provider"] for row in content["rows"]} >= {"torch", "dense", "literal"}
    assert all(step["state"] in ("done", "skipped") for step in content["steps"].values())
    assert all(check["passed"] for check in content["checks"])
    text = path.with_suffix(".md").read_text()
    assert "Not a GPU" in text
    assert "order_tokens" in text


def test_device_faults_are_known_by_their_words():
    """The messages by which PyTorch says that a device takes no more work."""
    assert any(word in "CUDA error: misaligned address" for word in plan.LOST)
