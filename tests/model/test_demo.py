"""The demo: its task is what it says, its tokenizer loses nothing, and a quick run leaves a whole report."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file
from typer.testing import CliRunner

from graphmoe_cli.app import app
from graphmoe_model.demo import __main__ as demo_main
from graphmoe_model.demo.__main__ import parse_arguments
from graphmoe_model.demo.base import BaseTexts, make_tokenizer
from graphmoe_model.demo.commands import evaluation_command, on_a_real_model, real_commands
from graphmoe_model.demo.fine_tuning import BATCH, load_adapter, load_base, score
from graphmoe_model.demo.scale import QUICK
from graphmoe_model.demo.task import (
    CHOICES,
    GROUPS,
    OPPOSITE,
    SKILLS,
    WORDS,
    held_out_questions,
    key_of,
    training_questions,
)
from graphmoe_model.questions import QuestionEncoder, load_questions
from graphmoe_model.training import train
from graphmoe_tables.recipe_files import recipe_of
from graphmoe_tables.tasks import fetched_names

ROOT = Path(__file__).resolve().parents[2]
EACH = 100  # held-out questions of each skill, as in the full demo


@pytest.fixture(scope="module")
def held_out():
    return held_out_questions(0, EACH)


@pytest.fixture(scope="module")
def asked(held_out):
    """The held-out questions of all skills."""
    return [question for own in held_out for question in own]


@pytest.fixture(scope="module")
def questions(held_out):
    """Questions as training draws them."""
    return training_questions(1, 4000, held_out)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(0)


def group_of(question) -> str:
    """What a question asks for."""
    return question.question.removeprefix("which is ").removesuffix("?")


def is_right(asked: str, option: str) -> bool:
    """The demo's rules anew, from its word lists alone."""
    if asked.startswith("opposite of "):
        return OPPOSITE[asked.removeprefix("opposite of ")] == option
    return option in GROUPS[asked]


def test_one_option_is_right_and_it_is_the_answer(asked, questions):
    """A question with two right options, or a wrong key, would cap the accuracy for no visible reason."""
    for question in [*asked, *questions]:
        assert len(set(question.choices)) == CHOICES, question
        right = [is_right(group_of(question), choice) for choice in question.choices]
        assert right == [place == question.answer for place in range(CHOICES)], question


def test_parities_and_opposites_are_true():
    """The word lists, which the test above believes."""
    assert all(int(number) % 2 == 0 for number in GROUPS["even"])
    assert all(int(number) % 2 == 1 for number in GROUPS["odd"])
    assert all(OPPOSITE[other] == word != other for word, other in OPPOSITE.items())


def skill_of(question) -> str:
    """Found from the word lists, as a question does not say it."""
    asked = group_of(question)
    if asked.startswith("opposite of "):
        return "opposite"
    return {"even": "even or odd", "odd": "even or odd"}.get(
        asked, "vowel or consonant" if asked in ("vowel", "consonant") else "kind of thing"
    )


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_spread_evenly_over_the_labels(questions, skill):
    """Otherwise a model that always says A beats chance. 16.3 is the 99.9% point of chi-square for 3 degrees."""
    counts = Counter(question.label for question in questions if skill_of(question) == skill)
    expected = sum(counts.values()) / CHOICES
    assert expected > 100
    assert sum((counts[label] - expected) ** 2 / expected for label in "ABCD") < 16.3, counts


def test_training_never_sees_a_held_out_question_in_any_order(held_out, asked):
    """A shared question, choices shuffled or not, would turn the held-out accuracy into memory."""
    keys = {key_of(question) for question in asked}
    assert len(keys) == len(asked) == EACH * len(SKILLS)
    assert {own.name: len(own) for own in held_out} == dict.fromkeys(SKILLS, EACH)
    assert all(skill_of(question) == own.name for own in held_out for question in own)
    drawn = training_questions(0, 4000, held_out)
    assert not keys & {key_of(question) for question in drawn}
    assert not {q.prompt for q in drawn} & {q.prompt for q in asked}
    assert keys & {key_of(question) for question in training_questions(0, 4000, ())}, "it would not have been seen"


def test_the_base_model_is_taught_no_skill_in_question_form(tokenizer):
    """The base may find a word it is given; if it were asked for a group, "before" would not be before."""
    texts = BaseTexts(tokenizer, 2000, 0)
    asked = 0
    for i in range(len(texts)):
        text = tokenizer.decode(texts[i]["input_ids"][1:])
        if not text.startswith("Question:"):
            continue
        asked += 1
        word = text.removeprefix("Question: which is ").split("?")[0]
        label = text[-1]
        assert word in WORDS
        assert f"{label}. {word}\n" in text  # the answer is the very word that was asked for
    assert 0 < asked < len(texts)


def test_one_seed_gives_one_task_and_another_gives_another(held_out):
    """The demo's figures can be had again from the seed that the report names; fewer steps see the first questions."""
    assert held_out_questions(0, EACH) == held_out
    assert held_out_questions(1, EACH) != held_out
    drawn = training_questions(0, 50, held_out)
    assert training_questions(0, 50, held_out) == drawn
    assert training_questions(0, 20, held_out) == drawn[:20]
    assert training_questions(1, 50, held_out) != drawn


def test_tokenizer_gives_every_text_back(tokenizer, asked):
    """Byte-level: also text that it was not trained on, and no unknown token anywhere."""
    strange = ["", " ", "\n\n A.B:C?", "naïve ☃ 東京 🙂", "\x00\x7f", "unbelievable 12345"]
    for text in [*strange, *(question.prompt for question in asked)]:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text


def test_an_answer_is_one_token_and_the_only_one_with_a_loss(tokenizer, asked):
    """Scoring reads one token's logits, so a label must be one token in its place after the prompt."""
    labels = {label: tokenizer.encode(f" {label}", add_special_tokens=False) for label in "ABCD"}
    assert all(len(ids) == 1 for ids in labels.values())
    assert len({tuple(ids) for ids in labels.values()}) == CHOICES
    encoder = QuestionEncoder(tokenizer)
    for question in asked:
        item = encoder.training_row(question)
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(question.prompt, add_special_tokens=False)]
        assert item["input_ids"] == prompt + labels[question.label]
        assert item["labels"] == [-100] * len(prompt) + labels[question.label]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--out", __file__], "is a file"),
    ],
)
def test_wrong_options_end_with_a_message(arguments, message, capsys):
    """A wrong value is named before anything is trained."""
    with pytest.raises(SystemExit) as end:
        parse_arguments(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The folder of a quick run, every stage end to end, as a user starts it; beside a file of someone else's.

    Exit status 0: the reloaded adapter gave the same log-probabilities, and no method diverged.
    """
    folder = tmp_path_factory.mktemp("demo")
    (folder / "notes.txt").write_text("mine")
    result = subprocess.run(
        [sys.executable, "-m", "graphmoe_model.demo", "--quick", "--out", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stdout + result.stderr
    assert result.stdout.rstrip().splitlines()[-1] == on_a_real_model()
    return folder


def test_quick_run_writes_the_report_and_an_adapter(report):
    text = (report / "report.md").read_text()
    assert "synthetic" in text
    for plot in ("loss.png", "accuracy.png", "expert_load.png", "latency.png", "comparison.png"):
        assert f"({plot})" in text
        assert (report / plot).stat().st_size > 0
    assert (report / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert (report / "notes.txt").read_text() == "mine"
    assert text.rstrip().splitlines()[-1] == on_a_real_model()


def test_graphmoe_eval_gives_the_accuracy_that_the_report_states(report):
    """By the command that the report names: the demo's own scoring would otherwise be another one."""
    text = (report / "report.md").read_text()
    command = evaluation_command(report)
    assert f"`{command}`" in text
    words = shlex.split(command)
    folder, pattern = words[words.index("--data") + 1].rsplit("/", 1)
    files = sorted(Path(folder).glob(pattern))
    assert len(files) == len(SKILLS)
    output, records = report / "evaluation.json", report / "records.jsonl"
    arguments = [*words[1 : words.index("--data") + 1], *map(str, files), "--device", "cpu"]
    run = CliRunner().invoke(app, [*arguments, "--output", str(output), "--records", str(records)])
    assert run.exit_code == 0, run.output
    tasks = json.loads(output.read_text())["tasks"]
    for skill in SKILLS:
        reached = tasks[skill.replace(" ", "_")]["first_token_accuracy"]
        assert re.search(rf"^\| {skill} \| [\d.]+% \| {100 * reached:.1f}% \|", text, re.MULTILINE), skill
    # Few questions have few accuracies: that it was this adapter that answered, its log-probabilities say.
    held_out = held_out_questions(0, QUICK.questions)
    found = sorted(str(json.loads(line)["label_logprobs"]) for line in records.read_text().splitlines())
    assert found == logprobs(score(*load_adapter(report / "base", report / "adapter"), held_out))
    assert found != logprobs(score(*load_base(report / "base"), held_out))


def logprobs(results) -> list[str]:
    return sorted(str(record.label_logprobs) for result in results for record in result.records)


def test_the_recipe_and_questions_that_are_left_are_those_of_the_adapter(report):
    """`graphmoe train --config` with them trains this very adapter again."""
    recipe = recipe_of({"output": str(report / "again")}, report / "adapter" / "recipe.yaml")
    (data,) = recipe.data
    questions = load_questions(data).questions
    assert list(questions) == training_questions(0, BATCH * QUICK.steps, held_out_questions(0, QUICK.questions))
    train(recipe, questions, say=lambda line: None)
    first, again = (load_file(report / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_folder_that_is_not_the_demos_is_not_emptied(report, tmp_path, capsys):
    """It empties its own of an earlier run, `adapter` among them: a name that somebody else's could have too."""
    assert parse_arguments(["--out", str(report)]).out == report
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--out", str(tmp_path)])
    assert end.value.code == 2
    assert f"{tmp_path / 'adapter'} that this demo did not make" in " ".join(capsys.readouterr().err.split())


def test_missing_packages_are_said_before_anything_is_trained(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_main.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else name)
    assert demo_main.main(["--out", str(tmp_path / "report")]) == 1
    assert capsys.readouterr().err == "The demo needs lm_eval: pip install 'graphmoe[demo]'\n"
    assert not (tmp_path / "report").exists()


def test_what_the_demo_asks_for_is_what_its_extra_brings():
    """Else `pip install graphmoe[demo]` would end where the demo begins, or the demo where training does."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for name in ("demo", "train", "eval") for line in extras[name]]
    assert lines[0] == "graphmoe[train,eval]"
    assert set(demo_main.EXTRA) <= {Requirement(line).name for line in lines}


def test_the_commands_for_a_real_model_are_taken_by_graphmoe(monkeypatch, tmp_path):
    """Each is accepted up to what was not fetched here: what the demo ends with has to work as it stands."""
    monkeypatch.setenv("GRAPHMOE_DATA", str(tmp_path / "my data"))
    monkeypatch.chdir(tmp_path)
    fetch, *others = (shlex.split(command) for command in real_commands())
    assert fetch[:3] == ["graphmoe", "data", "fetch"]
    assert set(fetch[3:]) <= set(fetched_names())
    for words in others:
        run = CliRunner().invoke(app, words[1:], env={"COLUMNS": "400"})
        assert run.exit_code == 2
        assert "my data" in run.output, run.output
