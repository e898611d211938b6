"""``graphmoe train`` as it is called: options reach the run, the end is said, what is wrong ends in one line."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from graphmoe_cli import train as command
from graphmoe_cli.runs import train as runs
from graphmoe_tables.recipe import TrainingRecipe
from tests.cli import command as command_line
from tests.model import training_runs
from tests.model.training_runs import SMALL

graphmoe = partial(command_line.graphmoe, columns=200)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a base model, questions, and a file of small settings."""
    root = tmp_path_factory.mktemp("train")
    training_runs.make_base(root / "base")
    training_runs.write_questions(root / "questions.jsonl", 16)
    training_runs.write_questions(root / "held_out.jsonl", 5, seed=1)
    (root / "small.yaml").write_text(yaml.safe_dump({**SMALL, "max_steps": 2}), encoding="utf-8")
    return root


def arguments(root: Path, output: Path, *more: object) -> tuple[object, ...]:
    small, data = root / "small.yaml", root / "questions.jsonl"
    return ("train", "--config", small, "--model", root / "base", "--data", data, "--output", output, *more)


def test_a_run_from_the_command_line(root, tmp_path):
    """Log lines where there is no terminal, a table at the end, and the command that evaluates."""
    result = graphmoe(*arguments(root, tmp_path / "out", "--eval-data", root / "held_out.jsonl", "--rounds", 3))
    assert result.exit_code == 0, result.output
    assert "step 1/2: loss " in result.stdout
    assert "router loss " in result.stdout
    for name in ("steps", "evaluation loss", "time", "peak memory", "trainable parameters", "adapter"):
        assert name in result.stdout
    text = " ".join(result.stdout.split())
    told = f"graphmoe eval --model {root / 'base'} --adapter {tmp_path / 'out'} --dtype float32 --data YOUR-TEST.jsonl"
    assert told in text
    assert "evaluation: 5 questions, each 2 steps (--save-steps)" in text
    saved = json.loads((tmp_path / "out" / "train_result.json").read_text(encoding="utf-8"))
    assert (saved["steps"], saved["questions"]) == (2, 16)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))["rounds"] == 3

    again = graphmoe("train", "--config", tmp_path / "out" / "recipe.yaml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two
    resumed = graphmoe("train", "--config", tmp_path / "out" / "recipe.yaml", "--resume")
    assert resumed.exit_code == 0
    assert "nothing is left to do" in resumed.stdout


def test_a_refused_run_leaves_no_folder(root, tmp_path):
    """Refused where the folder was there already: the disk is asked for room in it."""
    result = graphmoe(*arguments(root, tmp_path / "new" / "out", "--keep-checkpoints", 10**12))
    assert result.exit_code == 2
    assert "GB free, and this run writes up to" in result.stderr
    assert not (tmp_path / "new").exists()


def test_what_was_trained_on_is_not_what_the_adapter_is_evaluated_on():
    """A task is, on the split that it is reported on; a file is one split."""
    for data, eval_data, asked in (
        (("boolq",), None, "boolq"),
        (("boolq:train", "mine.jsonl"), None, "boolq YOUR-TEST.jsonl"),
        (("mine.jsonl",), ("arc_easy:validation", "arc_easy:train"), "arc_easy"),
        (("mine.jsonl", "more.jsonl"), ("held_out.jsonl",), "YOUR-TEST.jsonl"),
    ):
        recipe = TrainingRecipe(model="m", output="o", data=data, eval_data=eval_data)
        told = runs._eval_command(recipe, "bfloat16")
        assert told == f"graphmoe eval --model m --adapter o --dtype bfloat16 --data {asked}"


def test_an_interrupted_run_says_how_it_goes_on(tmp_path, monkeypatch):
    def interrupted(recipe, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", interrupted)
    given = ("train", "--model", "m", "--data", "boolq", "--output", tmp_path / "my out")
    result = graphmoe(*given)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "graphmoe train: interrupted before training began; give the same command again\n"
    (tmp_path / "my out").mkdir()
    (tmp_path / "my out" / "recipe.yaml").touch()
    result = graphmoe(*given)
    assert result.exit_code == 130
    assert f"go on by graphmoe train --config '{tmp_path / 'my out' / 'recipe.yaml'}' --resume" in result.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "go on by torchrun ... -m graphmoe_cli train --config" in graphmoe(*given).stderr


@pytest.mark.parametrize("given, meant", [("--lr", "--learning-rate"), ("--rank=8", "--r"), ("--dataset", "--data")])
def test_options_of_other_trainers_are_told_with_the_one_that_is_meant(given, meant):
    result = graphmoe("train", given, "1")
    assert result.exit_code == 2
    assert f"no such option; did you mean {meant}?" in result.stderr


WRONG = {
    "no such file": (["--data", "nowhere.jsonl"], f"it was looked for as {Path.cwd() / 'nowhere.jsonl'}; run from the"),
    "an adapter as the model": (["--model", "ADAPTER"], "is an adapter: pass its base model with --model and the"),
    "no such task": (["--data", "boolk"], "boolk"),
    "an unknown key": (["--config", "KEY"], "unknown key 'learning'; did you mean 'learning_rate'?"),
    "no such model": (["--model", "./nowhere"], "there is no folder ./nowhere"),
    "an adapter's settings": (["--top-k", "9"], "top_k=9 exceeds num_experts=4"),
    "a folder of something else": (["--output", "ROOT"], "holds other files"),
    "an adapter that is none": (["--start-from", "nowhere", "--config", "EMPTY"], "--start-from nowhere: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_ends_in_one_line_and_status_2(case, root, tmp_path):
    (tmp_path / "KEY").write_text("learning: 1\n", encoding="utf-8")
    (tmp_path / "EMPTY").write_text("use_cpu: true\n", encoding="utf-8")
    more, message = WRONG[case]
    (tmp_path / "ADAPTER").mkdir()
    (tmp_path / "ADAPTER" / "adapter_config.json").touch()
    places = {"ADAPTER": tmp_path / "ADAPTER", "KEY": tmp_path / "KEY", "EMPTY": tmp_path / "EMPTY", "ROOT": root}
    given = [places.get(word, word) for word in more]
    names = [word for word in given if str(word).startswith("--")]
    kept = list(arguments(root, tmp_path / "out")[1:])
    kept = [word for pair in zip(kept[::2], kept[1::2], strict=True) if pair[0] not in names for word in pair]
    result = graphmoe("train", *kept, *given)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    if case == "an adapter as the model":
        assert result.stderr.endswith("with --adapter, or to train it on with --start-from\n")
    assert result.stderr.startswith("graphmoe train: error: ")
    assert len(result.stderr.splitlines()) == 1


def test_every_field_is_an_option_that_reaches_the_run(monkeypatch):
    """Each with a value of its kind; --no-... where it is true or false."""
    seen: list[TrainingRecipe] = []
    monkeypatch.setattr(runs, "run", lambda recipe, **_: seen.append(recipe))
    values = {
        "model": "m",
        "data": "boolq",
        "eval_data": "piqa",
        "output": "o",
        "scheduler": "cosine",
        "report_to": "none",
    }
    values |= {"router_aux_loss": "switch", "candidate_input": "hidden_state", "candidate_activation": "tanh"}
    values |= {
        "preset": "mixlora",
        "router_aux_loss_scope": "local",
        "max_length": 64,
        "epochs": 3.5,
        "num_experts": "4",
    }
    skip = ("gguf_file", "load_in_8bit", "start_from", "allow_other_base", "deepspeed", "use_cpu")  # exclude others
    given: list[object] = []
    expected = {}
    for field in dataclasses.fields(TrainingRecipe):
        if field.name in skip:
            continue
        kind = field.metadata["field"].kind
        value = values.get(field.name, {bool: True, int: 7, float: 0.25, str: "x", tuple: "e"}[kind])
        option = f"--{field.name.replace('_', '-')}"
        given += [option] if kind is bool else [option, value]
        expected[field.name] = (value,) if kind is tuple else value
    result = graphmoe("train", *given)
    assert result.exit_code == 0, result.output
    assert {name: getattr(seen[0], name) for name in expected} == expected
    for name in ("packing", "bf16", "fsdp"):
        result = graphmoe("train", *given, f"--no-{name}")
        assert result.exit_code == 0, result.output
        assert getattr(seen[-1], name) is False


def test_help_has_every_option_in_its_group():
    result = graphmoe("train", "--help")
    assert result.exit_code == 0
    for field in dataclasses.fields(TrainingRecipe):
        assert f"--{field.name.replace('_', '-')}" in result.stdout
        assert f"─ {field.metadata['field'].panel} ─" in result.stdout


def test_a_missing_extra_is_said(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    result = graphmoe("train", "--model", "m", "--data", "d", "--output", "o")
    assert result.exit_code == 2
    assert "training needs trl, accelerate, datasets: pip install 'graphmoe[train]'" in result.stderr


def test_of_many_processes_the_first_alone_says_what_is_wrong(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = graphmoe("train", "--data", "d", "--output", "o")
    assert (result.exit_code, result.stderr) == (2, "")
