"""A run of `pytest benchmarks`: its options, its order, its budget, and the files that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import devices, work
from benchmarks import gpu_report as report
from benchmarks import session as running
from benchmarks.cases import GROUPS, NOT_BY_DEFAULT, Case
from benchmarks.document import Document, load
from benchmarks.options import choose
from benchmarks.providers import PROVIDERS
from benchmarks.session import DeviceLost, NotMeasured, Session
from benchmarks.sizes import MODELS
from benchmarks.table import PLANS, rank, table

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("sizes", "groups", "providers", "tokens", "dtype", "device", "threads", "seconds", "minutes", "commit")
NEED_TRITON = {"check", "kernels"}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tries what happens without a CUDA device")


def chosen(**options):
    given = {**dict.fromkeys(NAMES), "device": "cpu", "sizes": "tiny", **options}
    return choose(SimpleNamespace(getoption=given.__getitem__))


def run(*arguments, timeout=300, **environment):
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)


def test_by_default_everything_but_the_long_groups_is_measured():
    found = chosen()
    assert {case.group for case in found.cases} - NEED_TRITON == set(GROUPS) - set(NOT_BY_DEFAULT) - NEED_TRITON
    assert {"liger", "triton"} >= found.left_out.keys()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sizes": "llama-4"}, f"--sizes: unknown llama-4; there are {', '.join(MODELS)}"),
        ({"groups": "layer,gru"}, f"--groups: unknown gru; there are {', '.join(GROUPS)}"),
        ({"providers": "unsloth"}, f"--providers: unknown unsloth; there are {', '.join(PROVIDERS)}"),
        ({"providers": "liger,dense"}, "--providers: cannot run here: liger: "),
        ({"groups": "routing", "providers": "dense"}, "--groups routing has no case with the providers dense"),
        ({"tokens": "1,many"}, "--tokens takes numbers with commas between them, got '1,many'"),
        ({"tokens": "0,5"}, "--tokens must be at least 1, got 0"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"seconds": -1.0}, "--seconds must not be negative, got -1.0"),
        ({"minutes": -1.0}, "--minutes must not be negative, got -1.0"),
        ({"sizes": ","}, "--sizes: no name; there are "),
        ({"groups": ""}, "--groups: no name; there are "),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, message, monkeypatch):
    """A misspelt size that ran the default, or a provider that was left out in silence, would be believed."""
    monkeypatch.setitem(PROVIDERS, "liger", PROVIDERS["liger"]._replace(missing=lambda device: "not installed"))
    with pytest.raises(pytest.UsageError) as error:
        chosen(**options)
    assert str(error.value).startswith(message)


@no_gpu
def test_a_gpu_that_is_not_there_is_no_reason_to_use_the_cpu():
    with pytest.raises(pytest.UsageError, match="--device cuda: PyTorch finds no CUDA device"):
        chosen(device="cuda")


@pytest.mark.parametrize("tokens", ["1", "512", "16,16"])
def test_one_token_count_gives_every_case_once(tokens):
    """The largest count is the smallest too: a case that stood twice would be measured twice."""
    names = [case.name for case in chosen(sizes="tiny,tiny", tokens=tokens).cases]
    assert len(names) == len(set(names))
    assert any("rounds, tiny, training" in name for name in names)


def test_no_time_at_all_is_a_time():
    """Zero seconds are the fewest turns, not the default."""
    assert chosen(seconds=0.0).seconds == 0.0


def test_the_methods_are_timed_side_by_side():
    """One word changed is one contender: the eight base methods, and GraphMoE on the six with experts."""
    cases = chosen(groups="methods", tokens="1,8").cases
    bases = ["LoRA", "DoRA", "MixLoRA", "MixDoRA", "LoRAMoE", "DoRAMoE", "MoLA", "MoDA"]
    assert [case.mode for case in cases] == ["inference", "inference", "training"]
    for case in cases:
        labels = [contender.label for contender in case.contenders]
        assert labels[0] == "dense"
        ours = [f"torch, {base}" for base in bases]
        assert [label for label in labels if label in ours] == ours
        for provider in ("torch", "literal"):
            assert {f"{provider}, GraphMoE({base})" for base in bases[2:]} <= set(labels)


def test_a_limited_run_begins_with_what_matters():
    """Checks before any time, then the layer at the sizes of the targets; prefill in a graph has its eager time too."""
    plan = PLANS["cuda"]
    cases = sorted(table(MODELS["llama-3-8b"], "cuda", "bf16", plan), key=lambda case: rank(case, plan, "bf16")[0])
    first = next(i for i, case in enumerate(cases) if case.group != "check")
    assert all(case.sizes.dtype == "bf16" for case in cases[:first])
    assert cases[first].name == "layer, llama-3-8b, inference, 8192 tokens, T=3, n=8, bf16"
    known = {(case.sizes.tokens, case.note): case.graph for case in cases if case.group == "layer"}
    assert known[2048, ""]
    assert not known[2048, "eager"]
    assert (8192, "eager") not in known


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A run of a minute, by a clock that stands still, of measurements that do nothing."""
    monkeypatch.setattr(work, "SMALL_SIZES", (2**16, (8, 8, 8)))
    monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: 100.0, perf_counter=time.perf_counter))
    found = chosen(groups="layer", seconds=0.0)._replace(end=160.0)
    return Session(found, Document(tmp_path / "r.json"))


def ask(session, measure, monkeypatch, case: Case | None = None):
    """What became of a case, whose measurement is ``measure``."""
    monkeypatch.setattr(running, "measure", measure)
    try:
        session[case or session.chosen.cases[0]]
    except Exception as error:
        return error
    return None


def state(session, case=None):
    steps = json.loads(session.document.path.read_text())["steps"]
    return steps[(case or session.chosen.cases[0]).name]


def raising(error, calls=None):
    def fail(case, place):
        if calls is not None:
            calls.append(case.name)
        raise error

    return fail


def test_what_no_time_is_left_for_is_skipped_and_named(session, monkeypatch):
    """The budget is hard: a case begins only if it can end in time, and later smaller ones still may."""
    running.time.monotonic = lambda: 145.0
    asked = ask(session, raising(AssertionError("begun")), monkeypatch)
    assert isinstance(asked, NotMeasured)
    assert state(session) == {"state": "skipped", "seconds": 0.0, "note": "15 s left, it may take 30"}
    smaller = next(case for case in session.chosen.cases if rank(case, session.chosen.plan, "fp32")[1] <= 15)
    assert isinstance(ask(session, raising(AssertionError("begun")), monkeypatch, smaller), AssertionError)


def test_a_case_that_raises_is_measured_once_and_the_rest_goes_on(session, monkeypatch):
    """Each of its tests tells the same error; the step says where it came from."""
    calls = []
    for _ in range(2):
        assert isinstance(ask(session, raising(ValueError("wrong shape"), calls), monkeypatch), ValueError)
    assert len(calls) == 1
    assert state(session)["state"] == "failed"
    assert state(session)["note"].startswith("ValueError: wrong shape (test_runner.py:")


def test_a_case_that_takes_more_memory_than_is_free_fails_alone(session, monkeypatch):
    """On a CPU the system would end this process, or another one, instead of telling it; a GPU's allocator tells."""
    kilobytes = devices._kilobytes
    monkeypatch.setattr(devices, "_kilobytes", lambda path, name: 50_000 if "mem" in path else kilobytes(path, name))
    refused = ask(session, lambda case, place: torch.ones(100_000_000), monkeypatch)
    assert "you tried to allocate 400000000 bytes" in str(refused)
    assert state(session)["state"] == "failed"
    assert torch.ones(100_000_000).all()


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on(session, monkeypatch):
    """After an illegal address nothing more can run in that process: the next one passes over the case."""
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert isinstance(ask(session, raising(lost), monkeypatch), DeviceLost)
    again = Session(session.chosen, Document(session.document.path))
    assert isinstance(ask(again, raising(AssertionError("begun again")), monkeypatch), NotMeasured)
    assert isinstance(ask(again, raising(KeyError()), monkeypatch, session.chosen.cases[1]), KeyError)


@no_gpu
@pytest.mark.parametrize("groups", [(), ("--groups", "tune")])
def test_without_a_gpu_it_says_so_and_fails(groups):
    """One sentence and an exit code: no traceback, no report that looks like one."""
    found = run("benchmarks.gpu_report", *groups)
    assert found.returncode == 2
    assert found.stdout == ""
    assert "needs a CUDA device, and there is none" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [(["--minutes", "0"], "--minutes must be at least 1, got 0"), (["--file", __file__], "is no JSON")],
)
def test_wrong_options_are_refused_before_anything_starts(arguments, message, tmp_path, capsys):
    """A page without a figure, or a traceback, is no answer."""
    with pytest.raises(SystemExit) as error:
        report.main(["--device", "cpu", "--sizes", "tiny", "--out", str(tmp_path), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_of_pytest_that_are_wrong_end_the_report(tmp_path, capfd):
    """What the second process refuses is not tried again, and leaves no page."""
    arguments = ["--device", "cpu", "--sizes", "nosuch", "--out", str(tmp_path)]
    assert report.main(arguments) == report.USAGE_ERROR
    assert "--sizes: unknown nosuch" in "".join(capfd.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_process_is_ended(tmp_path, monkeypatch):
    """A kernel that never returns must not take the whole lease with it."""
    monkeypatch.setattr(report, "STUCK_SECONDS", 0.5)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert report._wait(process, tmp_path / "none.json", end=time.monotonic() + 60) is None
    assert process.poll() is not None


def test_a_process_that_gets_nowhere_is_not_started_for_ever(tmp_path, monkeypatch, capfd):
    """A broken installation ends the run at once, with a page that says how far it came."""
    monkeypatch.setattr(report.sys, "executable", "/bin/false")
    report.supervise(["--device", "cpu"], tmp_path / "r.json", seconds=60)
    assert "ended with 1 before it began another case" in capfd.readouterr().err
    assert report.finish(tmp_path / "r.json") == 1
    assert "before it could say where it ran" in (tmp_path / "r.md").read_text()


@no_gpu
def test_the_whole_gpu_report_on_the_cpu(tmp_path):
    """The path that a GPU run takes: the two processes, limits, checks, kernels, a layer, JSON, Markdown, exit code."""
    pytest.importorskip("triton")
    arguments = ["--device", "cpu", "--sizes", "tiny", "--out", str(tmp_path), "--commit", "abc", "--tokens", "1,4"]
    only = (
        "check-gru",
        "kernels-gru-tiny-training-first-round-1-tokens-T3-n4",
        "layer-tiny-inference-1-tokens-T1",
    )
    found = run("benchmarks.gpu_report", *arguments, "--seconds", "0", "-k", " or ".join(only))
    assert found.returncode == 0, found.stdout + found.stderr
    (path,) = tmp_path.glob("cpu-*.json")
    content = load(path)
    assert content["conditions"]["commit"] == "abc"
    assert content["conditions"]["left out"].keys() >= {"liger"}
    assert {row["provider"] for row in content["rows"]} >= {"torch", "dense", "literal"}
    assert [each["kernel"] for each in content["kernels"]] == ["gru_forward", "gru_backward"]
    assert all(step["state"] == "done" for step in content["steps"].values())
    assert all(check["passed"] for check in content["checks"])
    text = path.with_suffix(".md").read_text()
    assert "Not a GPU" in text
    assert content["kernels"][0]["kernel"] in text


def test_pytest_benchmark_reads_and_compares_a_run(tmp_path, capfd, monkeypatch):
    """Its own JSON has every contender with its turns, and its own comparison takes it."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):  # with them it would measure nothing
        monkeypatch.delenv(name, raising=False)
    saved = tmp_path / "a.json"
    few = ["--sizes", "tiny", "--groups", "layer", "--providers", "dense,torch", "--tokens", "1", "--seconds", "0"]
    few += ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    few += ["--device", "cpu", "-k", "layer-tiny-inference-1-tokens-T1-n4-fp32 and not compile"]
    assert pytest.main(["benchmarks", *few, f"--benchmark-json={saved}"]) == 0
    stored = json.loads(saved.read_text())["benchmarks"]
    assert [each["extra_info"]["label"] for each in stored] == ["torch", "dense"]
    assert all(each["stats"]["rounds"] >= 6 and each["stats"]["median"] > 0 for each in stored)
    assert "(NOW)" not in capfd.readouterr().out
    assert pytest.main(["benchmarks", *few, f"--benchmark-compare={saved}"]) == 0
    compared = capfd.readouterr().out
    assert all(f"T1-n4-fp32-{name}] (NOW)" in compared for name in ("torch", "dense"))
