"""What comes at once: help, and refusals of wrong options, for which no model library may be loaded.

They are told by what a fresh process has loaded, not by a clock: PyTorch, PEFT and Transformers take seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from graphmoe_tables.tasks import MODELS, TASKS

HEAVY = ("torch", "transformers", "peft", "matplotlib", "graphmoe_kernels", "graphmoe_inference", "graphmoe_model")
COMMANDS = (
    *("profile", "params", "memory", "convert", "data", "data fetch", "train", "eval", "compare", "export"),
    *("analyze", "analyze balance", "analyze trace"),
    *("analyze sensitivity", "analyze parameters", "analyze activated"),
    *("analyze latency", "analyze composition"),
)
HELP = ["", "--help", *(f"{name} --help" for name in COMMANDS)]
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
    "profile --preset tiny --method graphmoe": "GraphMoE is mixlora with --rounds 3",
    "profile --preset tiny --method moe": "'moe' is not one of 'lora', 'mixlora'",
    "profile --preset tiny --method lora --rounds 2": "--method lora has no experts and so no rounds",
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
    "data nothing": "No such command 'nothing'",
    "data fetch": "Missing argument",
    "data fetch quarz": "nothing to fetch is called 'quarz', did you mean 'quartz'?",
    "data fetch quartz piqa": "piqa comes from the hub, when it is named",
    "data fetch quartz --to=": "name a folder",
    "data fetch quartz --unpack": "--unpack is about models, and none is named; there are smollm2",
    "eval --data boolq": "Missing option '--model'",
    "eval --model m": "name what to evaluate on: --data",
    "eval --model m --data": "it needs at least one value",
    "eval --model m --data boolq boolq": "--data names boolq twice",
    "eval --model m --data boolq --limit 0": "--limit must be at least 1, got 0",
    "eval --model m --data boolq --batch-size 0": "--batch-size must be at least 1, got 0",
    "eval --model m --data boolq --shots -1": "--shots must be at least 0, got -1",
    "eval --model m --data boolq --samples 0": "--samples must be at least 1, got 0",
    "eval --model m --data boolq --temperature 1": "say how many by --samples",
    "eval --model m --data boolq --samples 2 --temperature 0": "--temperature must be above 0, got 0.0",
    "eval --model m --data boolq --examples boolq:train": "say how many by --shots",
    "eval --model m --data boolq --max-length 8": "--max-length must be at least 16, got 8",
    "eval --model m --data boolk": "unknown task 'boolk', did you mean 'boolq'?",
    "eval --model m --data boolq:dev": "the task boolq has no split 'dev' with answers; it has train, validation",
    "eval --model m --data boolq --split dev": "the task boolq has no split 'dev'",
    "eval --model m --data /tmp": "/tmp is a folder; name one file of questions in it",
    "eval --model m --data none.jsonl": "there is no file none.jsonl to read questions from: it was looked for as /",
    "eval --model m --data boolq --shots 2 --examples boolq:dev": "the task boolq has no split 'dev'",
    "eval --model m --tasks arc_easy --samples 3": "--samples is about --data",
    "eval --model m --data boolq --load-in-4bit --load-in-8bit": "exclude each other",
    "eval --model m --data boolq --allow-other-base": "none was given",
    "eval --model m --data boolq --output /no/such/e.json": "there is no folder /no/such",
    "eval --model m --data boolq --output /tmp": "is a folder; name a file",
    "eval --model m --data boolq --dtype int8": "'int8' is not one of",
    "analyze": "Usage: graphmoe analyze",
    "analyze balance --model m --adapter a": "Missing option '--data'",
    "analyze balance --model m --adapter a a --data q": "--adapter names a twice",
    "analyze balance --model m --adapter a --data q --limit 0": "--limit must be at least 1, got 0",
    "analyze balance --model m --adapter a --data q --batch-size 0": "--batch-size must be at least 1, got 0",
    "analyze balance --model m --adapter a --data q --out /dev/null": "--out /dev/null is a file",
    "analyze trace --model m --adapter a": "name what to trace: --text with texts, or --data",
    "analyze trace --model m --adapter a --text x --draws 0": "--draws must be at least 1 and --seed at least 0, got 0",
    "analyze balance --model m --adapter a --data boolk": "unknown task 'boolk', did you mean 'boolq'?",
    "analyze trace --model m --adapter a --data none.jsonl": "there is no file none.jsonl",
    "analyze sensitivity": "Missing option '--config'",
    "analyze sensitivity --config none.yaml": "cannot read the recipe none.yaml",
    "analyze parameters --config none.yaml": "Missing option '--ranks'",
    "analyze latency": "Missing argument",
    "analyze composition none.json": "there is no file none.json",
    "export --model m --adapter a": "Missing option '--output'",
    "export --model m --adapter a --output /tmp": "--output /tmp is there already; name a new folder",
    "convert a": "Missing argument",
    "convert a b --to gguf": "'gguf' is not one of 'graphmoe'",
    "convert a b --rounds 0": "rounds must be at least 1, got 0",
    "train --data q --output o": "name the base model by --model, or as model in the file of --config",
    "train --model m --output o": "name what to train on by --data",
    "train --model m --data q": "name the adapter's folder by --output",
    "train --model m --data --output o": "it needs at least one value",
    "train --model m --data q --output o --learning-rate -1": "must be a number above 0 and at most 1, got -1",
    "train --model m --data q --output o --learning-rate nan": "must be a number above 0 and at most 1, got nan",
    "train --model m --data q --output o --batch 0": "batch (--batch) must be a whole number of at least 1, got 0",
    "train --model m --data q --output o --scheduler step": "'step' is not one of 'linear', 'cosine', 'constant'",
    "train --model m --data q --output o --preset mixlor": "unknown preset 'mixlor'; there are lora",
    "train --model m --data q --output o --max-length 8": "must be a whole number of at least 16, got 8",
    "train --model m --data q --output o --config none.yaml": "cannot read the recipe none.yaml: No such file",
    "train --model m --data boolk --output o": "unknown task 'boolk', did you mean 'boolq'?",
    "train --model m --data boolq --eval-data boolq:dev --output o": "the task boolq has no split 'dev'",
    "train --model m --data q --output o --load-in-4bit --load-in-8bit": "--load-in-4bit and --load-in-8bit exclude",
    "train --model m --data q --output o --fsdp --load-in-8bit": "FSDP2 splits floating dtypes only; --load-in-4bit",
    "train --model m --data q --output o --start-from a --r 8": "--start-from has the adapter's own settings",
    "train --model m --data q --output o --fsdp --deepspeed zero2.json": "--fsdp and --deepspeed exclude each other",
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
    lines = [*HELP, "--version", "data list", *WRONG]
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


def test_the_list_of_tasks_loads_no_model_library(answers):
    status, text, loaded = answers["data list"]
    assert (status, loaded) == (0, [])
    assert all(name in text for name in (*TASKS, *MODELS))


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


@pytest.mark.parametrize("columns", [None, "60", "80", "99", "100", "200"], ids=lambda value: value or "pipe")
def test_names_of_options_are_whole(columns):
    """At every width of a terminal, and in a pipe."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "TERMINAL_WIDTH")}
    environment |= {} if columns is None else {"COLUMNS": columns}
    command = [sys.executable, "-m", "graphmoe_cli", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    words = done.stdout.split()
    assert "…" not in done.stdout
    assert {"--router-aux-loss-coef", "--router-aux-loss-scope", "--no-gradient-checkpointing"} <= set(words)
