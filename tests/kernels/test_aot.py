"""The compile inspector finds what it is there for, and the operators' kernels pass it.

It runs in a process of its own: this one may interpret kernels, and then it can compile none.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphmoe_kernels.aot import __main__ as command_line
from graphmoe_kernels.aot.catalogue import MODULES, cases
from graphmoe_kernels.aot.limits import sm_90_blocks

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
MADE_FOR_THIS = "tests.kernels.aot_kernels"


def run_inspector(*arguments):
    """`python -m graphmoe_kernels.aot`, in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "graphmoe_kernels.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made_for_this(tmp_path_factory):
    """The inspector's run over this test's own kernels on sm_90, and the readings by their names."""
    path = tmp_path_factory.mktemp("aot") / "readings.json"
    result = run_inspector("--cases", MADE_FOR_THIS, "--target", "sm_90", "--json", str(path))
    assert path.exists(), result.stderr
    return result, {reading["name"]: reading for reading in json.loads(path.read_text())}


def test_faults_are_named_and_fail_the_run(made_for_this):
    result, readings = made_for_this
    assert result.returncode == 1
    assert "7 cases, 5 with faults" in result.stdout
    for name, fault in {
        "faulty: no hgmma": "a matrix kernel without HGMMA instructions",
        "faulty: spill": "spills",
        "faulty: shared": "bytes of shared memory; the limit is 232448",
        "faulty: size": "does not compile",
        "faulty: crash": "the compiler crashed",
    }.items():
        assert len(readings[name]["faults"]) == 1
        assert fault in readings[name]["faults"][0]
        assert f"{name} for sm_90: " in result.stdout


def test_clean_kernels_have_no_fault(made_for_this):
    _, readings = made_for_this
    matmul = readings["clean matmul"]
    assert readings["clean copy"]["faults"] == matmul["faults"] == []
    assert matmul["hgmma"] > 0
    assert matmul["registers"] > 32
    assert matmul["shared_bytes"] > 0
    assert matmul["spill_bytes"] == matmul["local_loads"] == matmul["local_stores"] == 0


def test_readings_of_other_targets(tmp_path):
    """Each target's matrix instructions are counted in its own column, and a clean run succeeds."""
    path, targets = tmp_path / "readings.json", {"sm_80": "hmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    arguments = [word for target in targets for word in ("--target", target)]
    result = run_inspector("--cases", MADE_FOR_THIS, "--kernel", "clean matmul", *arguments, "--json", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    for reading in json.loads(path.read_text()):
        counts = {name: reading[name] for name in ("hgmma", "hmma", "tcgen05", "mfma")}
        assert [name for name, count in counts.items() if count] == [targets[reading["target"]]]


def test_blocks_of_a_multiprocessor():
    """What runs out first: registers, shared memory, warps, or places for blocks."""
    assert sm_90_blocks(registers=255, shared_bytes=0, num_warps=4) == 2
    assert sm_90_blocks(registers=64, shared_bytes=100 * 1024, num_warps=4) == 2
    assert sm_90_blocks(registers=16, shared_bytes=0, num_warps=8) == 8
    assert sm_90_blocks(registers=16, shared_bytes=0, num_warps=1) == 32


@pytest.mark.parametrize(
    "interpreted, arguments, message",
    [
        (True, [], "TRITON_INTERPRET is set"),
        (False, ["--cases", MADE_FOR_THIS, "--kernel", "no such"], "no case's name contains 'no such'"),
    ],
)
def test_a_run_that_would_compile_nothing_is_refused(interpreted, arguments, message, monkeypatch, capsys):
    """A run that compiled nothing must not look like a success."""
    monkeypatch.setattr(command_line, "interpreting", lambda: interpreted)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_one_kernel_of_each_operator():
    """The operators' cases are found, with the shipped configurations, and compile."""
    names = [cases(module, "sm_90")[0].name for module in MODULES]
    result = run_inspector("--target", "sm_90", *(word for name in names for word in ("--kernel", name)))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_every_kernel_on_every_target():
    """What `make aot` does."""
    result = run_inspector()
    assert result.returncode == 0, result.stdout + result.stderr
