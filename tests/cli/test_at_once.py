"""What comes at once: help, and refusals of wrong options, for which no model library may be loaded.

They are told by what a fresh process has loaded, not by a clock: PyTorch, PEFT and Transformers take seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

HEAVY = ("torch", "transformers", "peft", "matplotlib", "graphmoe_kernels", "graphmoe_model")
HELP = ["", "--help", *(f"{name} --help" for name in ("profile", "params", "memory", "convert"))]
# Command line -> what the refusal says. What a model, a file or a configuration has to be asked for comes later.
WRONG = {
    "prams": "No such command 'prams'",
    "profile --sequence 4": "No such option: --sequence",
    "profile --preset tiny --dtype int8": "'int8' is not one of",
    "profile --preset tiny --phase train": "'train' is not one of",
    "profile --preset tiny --phase prefill,decode": "separated by spaces: --phase prefill decode",
    "memory --model tiny --strategy=ddp,fsdp2": "separated by spaces: --strategy ddp fsdp2",
    "profile --preset tiny --seq": "it needs at least one value",
    "profile": "name the model by --model or by --preset (tiny",
    "profile --preset tyni": "unknown model 'tyni'; there are tiny",
    "profile --preset tiny --layers 0": "at least 1 layer, got 0",
    "profile --preset tiny --rounds -1": "rounds must be 0 (no adapter) or more, got -1",
    "profile --preset tiny --batch 0": "batch must be at least 1, got 0",
    "profile --preset tiny --repetitions 0": "repetitions must be at least 1, got 0",
    "profile --preset tiny --seq 0": "a sequence must have at least 1 token, got 0",
    "profile --preset llama-3-8b --seq 9000": "longer than the model's 8192 positions",
    "params": "name what to count",
    "params --preset mixlor --model tiny": "unknown preset 'mixlor'; there are lora",
    "params --preset mixlora": "name the base model by --model",
    "params --method moe": "'moe' is not one of 'lora', 'mixlora', 'loramoe', 'mola'",
    "params --adapter a --preset mola": "leave out --preset",
    "params --adapter my-adaptr": "there is no such folder here, and on the hub an adapter is called owner/name",
    "params --adapter out/checkpoint-10/last": "there is no such folder here",
    "profile --preset tiny --adapter my-adaptr": "there is no such folder here",
    "memory": "Missing option '--model'",
    "memory --model tiny --strategy fsdp": "unknown strategy 'fsdp'; there are single",
    "memory --model tiny --preset mixlor": "unknown preset 'mixlor'",
    "memory --model tiny --gpus 0": "gpus must be at least 1, got 0",
    "memory --model tiny --tokens 1": "tokens must be at least 2, got 1",
    "convert a": "Missing argument",
    "convert a b --to gguf": "'gguf' is not one of 'graphmoe'",
    "convert a b --rounds 0": "rounds must be at least 1, got 0",
    "convert a b --to moe-peft --rounds 3": "goes with the format 'graphmoe' alone",
}
RUN = """
import contextlib, io, json, sys
from graphmoe_cli.app import app

found = []
for line in json.loads(sys.argv[1]):
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            app(line.split(), prog_name="graphmoe")
        except SystemExit as end:
            code = end.code
    found.append([code, out.getvalue(), sorted(set(json.loads(sys.argv[2])) & set(sys.modules))])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, list[str]]]:
    """Command line -> its status, what it printed, and what was loaded by then, all in one fresh process."""
    lines = [*HELP, "--version", *WRONG]
    command = [sys.executable, "-c", RUN, json.dumps(lines), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout), strict=True))


def words(text: str) -> str:
    """The text without the frame that Typer draws around it."""
    return " ".join(word for word in text.split() if word.strip("│╭╮╰╯─"))


@pytest.mark.parametrize("line", HELP)
def test_help_loads_no_model_library(line, answers):
    status, text, loaded = answers[line]
    assert status == (0 if line else 2)  # without any argument: the help, as of something that is missing
    assert "Usage: graphmoe" in text
    assert loaded == []


def test_the_version_is_the_distributions(answers):
    assert answers["--version"] == [0, f"graphmoe {version('graphmoe')}\n", []]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_option_loads_no_model_library(line, answers):
    """And says what is wrong, with status 2."""
    status, text, loaded = answers[line]
    assert status == 2
    assert WRONG[line] in words(text)
    assert loaded == []


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "graphmoe_cli", "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: graphmoe" in done.stdout
