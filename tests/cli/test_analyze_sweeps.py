"""Sweeps by ``graphmoe analyze``, from a recipe to table, picture and JSON, and what they refuse."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("trl")
pytest.importorskip("lm_eval")

from graphmoe_model.analysis import one_run
from graphmoe_model.training import DivergedError, train
from tests.cli.command import graphmoe
from tests.cli.drawn_pictures import assert_picture
from tests.model import training_runs


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A recipe of two steps on a tiny model, and the questions that it names."""
    root = tmp_path_factory.mktemp("swept")
    training_runs.make_base(root / "model")
    training_runs.write_questions(root / "train.jsonl", 24)
    training_runs.write_questions(root / "test.jsonl", 6, seed=1)
    recipe = {**training_runs.SMALL, "model": str(root / "model"), "data": [str(root / "train.jsonl")], "max_steps": 2}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root


def sweep(swept: Path, kind: str, *arguments: object, out: Path) -> Any:
    given = ("--config", swept / "recipe.yaml", "--test-data", swept / "test.jsonl", "--out", out)
    return graphmoe("analyze", kind, *given, *arguments)


def test_a_sweep_over_rounds_and_scales(swept, tmp_path):
    """Table, picture and JSON; the same command again runs nothing, another one is refused."""
    grid = ("--rounds", 1, 2, "--scales", 0.25, 0.5, "--seeds", 0, 1)
    result = sweep(swept, "sensitivity", *grid, out=tmp_path / "s")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    titles = ["the base model", "T = 1", "T = 2, GRU 0.25", "T = 2, GRU 0.5"]
    assert [own["title"] for own in document["results"]] == titles
    assert [own["seeds"] for own in document["results"]] == [[0], [0, 1], [0, 1], [0, 1]]
    assert [own["axis"] for own in document["series"]] == ["rounds T", "GRU width over the hidden size"]
    assert_picture(tmp_path / "s" / "sensitivity.png")
    for own in document["results"]:
        assert f"{100 * own['accuracy']['test']['mean']:.1f}" in result.stdout
        assert own["title"] in result.stdout
    again = sweep(swept, "sensitivity", *grid, out=tmp_path / "s")
    assert again.exit_code == 0
    assert "run 1 of" not in again.stdout
    other = sweep(swept, "sensitivity", "--rounds", 1, out=tmp_path / "s")
    assert other.exit_code == 2
    assert "holds a sweep with seeds [0, 1], not [0]; settings.t-2-gru-0.25" in other.stderr


def test_a_sweep_whose_last_setting_diverges_ends_and_ends_again(swept, tmp_path, monkeypatch):
    """The conditions are of those that answered; those of other machines are said."""

    def diverges(run: Any, *args: Any, **kwargs: Any) -> Any:
        if run.rounds == 2:
            raise DivergedError("the loss is nan at step 1")
        return train(run, *args, **kwargs)

    monkeypatch.setattr(one_run, "train", diverges)
    for _ in range(2):
        result = sweep(swept, "sensitivity", "--rounds", 1, 2, out=tmp_path / "s")
        assert result.exit_code == 0, result.output
        assert "0, 1 diverged" in result.stdout
        assert "made alike" not in result.stdout
        document = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
        base = json.loads((tmp_path / "s" / "runs" / "base.json").read_text())
        assert document["conditions"]["dtype"] == base["conditions"]["dtype"] == "float32"
        assert document["varied"] == {}
        assert document["commits"] == [commit for commit in [base["conditions"]["commit"]] if commit]
    base["conditions"].update(device="cuda (X)", versions={**base["conditions"]["versions"], "torch": "1.0"})
    (tmp_path / "s" / "runs" / "base.json").write_text(json.dumps({**base}), encoding="utf-8")
    result = sweep(swept, "sensitivity", "--rounds", 1, 2, out=tmp_path / "s")
    document = json.loads((tmp_path / "s" / "sensitivity.json").read_text())
    here = document["conditions"]["device"]
    assert document["varied"] == {"device": ["cuda (X)", here], "torch's version": ["1.0", version("torch")]}
    said = f"Not all runs were made alike, so compare them with care: device cuda (X) and {here}; torch's version 1.0 "
    assert said in result.stdout


def test_a_sweep_has_the_recipes_seed_unless_others_are_given(swept, tmp_path):
    recipe = {**yaml.safe_load((swept / "recipe.yaml").read_text()), "seed": 7}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for seeds, expected in (((), [7]), (("--seeds", 0), [0])):
        given = ("--top-k", 2, "--config", tmp_path / "recipe.yaml", "--test-data", swept / "test.jsonl", *seeds)
        result = graphmoe("analyze", "activated", *given, "--no-plot", "--out", tmp_path / str(expected))
        assert result.exit_code == 0, result.output
        document = json.loads((tmp_path / str(expected) / "activated.json").read_text())
        assert document["sweep"]["seeds"] == document["results"][1]["seeds"] == expected


def test_a_sweep_does_not_ask_what_it_trained_on(swept, tmp_path):
    """A file has one split, so without others to ask the accuracy would be that of what was learnt by heart."""
    result = graphmoe("analyze", "activated", "--config", swept / "recipe.yaml", "--top-k", 1, "--out", tmp_path / "s")
    assert result.exit_code == 2
    assert "train.jsonl, which has no other questions to ask; name some by --test-data" in result.stderr
    assert not (tmp_path / "s").exists()


def test_questions_that_were_trained_on_are_counted_in_a_line(swept, tmp_path):
    """The same questions under another name are no others."""
    lines = (swept / "train.jsonl").read_text().splitlines()[:2] + (swept / "test.jsonl").read_text().splitlines()[:1]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    given = ("--top-k", 2, "--config", swept / "recipe.yaml", "--test-data", tmp_path / "mixed.jsonl", "--no-plot")
    result = graphmoe("analyze", "activated", *given, "--out", tmp_path / "s")
    assert result.exit_code == 0, result.output
    assert "2 of 3 questions of mixed are trained on too: " in result.stdout
    told = sweep(swept, "activated", "--top-k", 2, "--no-plot", out=tmp_path / "other").stdout
    assert "trained on too" not in told
    other_kind = sweep(swept, "sensitivity", "--rounds", 1, out=tmp_path / "s")
    assert other_kind.exit_code == 2
    assert "holds a sweep of graphmoe analyze activated; name another folder" in other_kind.stderr


def test_an_interrupted_sweep_says_how_it_goes_on(swept, tmp_path, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphmoe_cli.runs.analyze_sweep.run_sweep", interrupted)
    result = sweep(swept, "activated", "--top-k", 2, out=tmp_path / "s")
    assert result.exit_code == 130
    assert result.stderr == "graphmoe analyze activated: interrupted; the same command goes on\n"


@pytest.mark.parametrize(
    "kind, grid, titles",
    [
        ("parameters", ("--ranks", 2), ["GraphMoE(MixLoRA), r 2", "MixLoRA, r 3"]),
        ("activated", ("--top-k", 1, 2), ["top 1", "top 2"]),
    ],
)
def test_sweeps_over_ranks_and_experts_per_token(swept, tmp_path, kind, grid, titles):
    result = sweep(swept, kind, *grid, "--limit", 4, out=tmp_path / "s")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "s" / f"{kind}.json").read_text())
    assert [own["title"] for own in document["results"]] == ["the base model", *titles]
    assert document["sweep"]["kind"] == kind
    assert next(iter(document["sweep"]["asked"].values())).startswith("4 questions, ")
    assert_picture(tmp_path / "s" / f"{kind}.png")


def test_wrong_sweeps_end_in_one_line_and_status_2(swept, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for changes, arguments, message in (
        ({}, ("activated", "--top-k", 2, 9), "top 9: "),
        ({}, ("activated", "--top-k", 2, 2), "--top-k must be at least one number, each once, got [2, 2]"),
        ({}, ("sensitivity", "--rounds", 0), "--rounds must be numbers above 0, got 0"),
        ({}, ("parameters", "--ranks", 4, "--seeds", 1, 1), "--seeds must be 1 to 10 different numbers"),
        ({}, ("parameters", "--ranks", 4, "--limit", 0), "--limit must be at least 1, got 0"),
        ({"eval_data": ["boolq"]}, ("activated",), "the recipe has eval_data, which would choose a checkpoint"),
        ({"use_cpu": False, "fsdp": True}, ("activated",), "a sweep runs in one process; leave fsdp and deepspeed out"),
        ({"rounds": 1, "gru_hidden_scale": None}, ("parameters", "--ranks", 4), "it is its own base method"),
        (
            {},
            ("sensitivity", "--rounds", 1, "--scales", 0.001),
            "T = 2, GRU 0.001: gru_hidden_scale=0.001 gives a GRU of width 0",
        ),
        ({"lora_alpha": 5}, ("parameters", "--ranks", 3), "needs alpha 7.5 at this rank"),
        (
            {"report_to": "wandb"},
            ("activated", "--top-k", 2),
            "a sweep reports to no one, and the recipe has report_to",
        ),
        ({}, ("activated", "--out", tmp_path / "full"), "holds notes.txt and no sweep; name a new folder"),
    ):
        recipe = {**yaml.safe_load((swept / "recipe.yaml").read_text()), **changes}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        which, *words = arguments
        out = [] if "--out" in words else ["--out", tmp_path / "out"]
        given = ("--config", tmp_path / "recipe.yaml", "--test-data", swept / "test.jsonl")
        result = graphmoe("analyze", which, *given, *words, *out)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert result.stderr.startswith(f"graphmoe analyze {which}: error: ")
        assert not (tmp_path / "out").exists()
