"""Recipes: one table of options for the command line, the file and the run, and what is wrong in any of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from graphmoe_tables.methods import PRESETS
from graphmoe_tables.recipe import TrainingRecipe
from graphmoe_tables.recipe_fields import field_of, flag
from graphmoe_tables.recipe_files import as_yaml, differences, read_settings, recipe_of, write_recipe

NEEDED = {"model": "m", "data": ["a.jsonl", "boolq"], "output": "out"}


def written(folder: Path, text: str) -> Path:
    file = folder / "my.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_defaults_are_the_papers():
    """GraphMoE, Table 2."""
    recipe = TrainingRecipe(**NEEDED).resolved()
    expected = {
        **{"learning_rate": 2e-4, "batch": 16, "accumulation": 8, "epochs": 2, "max_length": 512},
        **{"lora_dropout": 0.05, "r": 16, "lora_alpha": 32, "num_experts": "8", "top_k": 2},
        **{"rounds": 3, "gru_hidden_scale": 0.1, "router_aux_loss_coef": 0.01, "preset": "graphmoe-mixlora"},
    }
    assert {name: getattr(recipe, name) for name in expected} == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_recipe_comes_back_from_its_file(preset, tmp_path):
    recipe = recipe_of({**NEEDED, "preset": preset, "learning_rate": 3e-05, "gru_learning_rate": 1e-5}).resolved()
    write_recipe(recipe, tmp_path)
    again = recipe_of({}, tmp_path / "recipe.yaml")
    assert again == recipe == recipe.resolved()
    assert differences(recipe, again) == []
    text = as_yaml(recipe)
    assert [f.name for f in dataclasses.fields(recipe) if f"{f.name}:" not in text] == []


def test_the_command_line_overrules_the_file(tmp_path):
    file = written(tmp_path, "model: m\ndata: boolq\noutput: out\nlearning_rate: 2e-5\nbatch: 4\npacking: true\n")
    recipe = recipe_of({"batch": 8, "packing": False, "seed": None}, file)
    assert (recipe.data, recipe.learning_rate, recipe.batch) == (("boolq",), 2e-5, 8)
    assert (recipe.packing, recipe.seed) == (False, 0)


@pytest.mark.parametrize("text, message", [
    ("learning_rte: 1\n", r"unknown key 'learning_rte'; did you mean 'learning_rate'\?"),
    ("gru-learning-rate: 1\n", r"unknown key 'gru-learning-rate'; did you mean 'gru_learning_rate'\?"),
    ("xyzzy: 1\n", r"has the unknown key 'xyzzy'$"),
    ("peft_type: GRAPHMOE\nr: 8\n", "is an adapter's configuration; name its recipe, recipe.yaml"),
    ("- a\n", "must be lines of the form 'key: value', got list"),
    ("model: [\n", "is no YAML: .*line 2"),
    ("resume: true\n", "unknown key 'resume'"),
])  # fmt: skip
def test_a_file_that_is_wrong(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_settings(written(tmp_path, text))


def test_an_empty_file_sets_nothing(tmp_path):
    assert read_settings(written(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize("settings, message", [
    ("batch: many", r"batch \(--batch\) must be a whole number of at least 1, got 'many'; leave it out for 16"),
    ("batch: 2.5", "must be a whole number of at least 1, got 2.5"),
    ("batch: true", "must be a whole number of at least 1, got True"),
    ("packing: 1", r"packing \(--packing\) must be true or false, got 1; leave it out for false"),
    ("learning_rate: .inf", "must be a number above 0 and at most 1, got inf; leave it out for 0.0002"),
    ("rounds: 0", "must be a whole number of at least 1, got 0; leave it out for the preset's"),
    ("model: 3.5", r"model \(--model\) must be a text that is not empty, got 3.5; correct it"),
    ("data: [1]", r"data \(--data\) must be a list of names, got \[1\]; correct it"),
    ("eval_data: []", r"eval_data \(--eval-data\) must be a list of names, got \[\]; leave it out for none"),
    ("seed: -1", "must be a whole number of at least 0 and at most"),
    ("report_to: paper", "must be one of auto, none, tensorboard"),
    ("gguf_file: a.gguf\nload_in_4bit: true", "--gguf-file and --load-in-4bit exclude each other"),
    ("allow_other_base: true", "--allow-other-base is about the adapter of --start-from, and none was given"),
    ("start_from: a\npreset: mola", "leave out --preset"),
    ("start_from: a\ngru_hidden_scale: 0.2", "with --start-from it needs --rounds of 2 or more"),
])  # fmt: skip
def test_a_value_that_is_wrong(settings, message, tmp_path):
    given = {name: value for name, value in NEEDED.items() if f"{name}:" not in settings.split()}
    with pytest.raises(ValueError, match=message):
        recipe_of(given, written(tmp_path, settings + "\n"))


def test_what_differs_is_named_but_for_what_changes_nothing():
    one = TrainingRecipe(**NEEDED)
    two = dataclasses.replace(one, output="b", logging_steps=1, keep_checkpoints=5, report_to="none", seed=3)
    assert differences(one, two) == ["seed (--seed) was 0 and is 3"]


def test_every_field_says_what_it_is():
    """Help is written for each, and a default that is None says what it stands for."""
    for field in dataclasses.fields(TrainingRecipe):
        described = field_of(field)
        assert described.help.endswith("."), field.name
        assert (described.unset is not None) == (field.default is None), field.name
        assert flag(field.name).startswith("--")


def test_the_example_in_the_docs():
    """The YAML of docs/train.md is a recipe."""
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    example = text.partition("```yaml\n")[2].partition("```")[0]
    known = {field.name for field in dataclasses.fields(TrainingRecipe)}
    assert yaml.safe_load(example).keys() <= known
    TrainingRecipe(**yaml.safe_load(example)).resolved()
    assert [name for name in known if flag(name) not in text] == []
