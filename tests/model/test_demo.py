"""The demo: its task is what it says, its tokenizer loses nothing, and a quick run leaves a whole report."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from graphmoe_model.demo.__main__ import parse_arguments
from graphmoe_model.demo.base import BaseTexts, TrainingQuestions, encode_question, make_tokenizer
from graphmoe_model.demo.task import (
    GROUPS,
    LABELS,
    OPPOSITE,
    SKILLS,
    WORDS,
    held_out_questions,
    training_question,
)

ROOT = Path(__file__).resolve().parents[2]
EACH = 100  # held-out questions of each skill, as in the full demo


@pytest.fixture(scope="module")
def held_out():
    return held_out_questions(0, EACH)


@pytest.fixture(scope="module")
def questions(held_out):
    """Questions as training draws them."""
    rng, keys = random.Random(1), {question.key for question in held_out}
    return [training_question(rng, keys) for _ in range(4000)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(0)


def is_right(asked: str, option: str) -> bool:
    """The demo's rules anew, from its word lists alone."""
    if asked.startswith("opposite of "):
        return OPPOSITE[asked.removeprefix("opposite of ")] == option
    return option in GROUPS[asked]


def test_one_option_is_right_and_it_is_the_answer(held_out, questions):
    """A question with two right options, or a wrong key, would cap the accuracy for no visible reason."""
    for question in [*held_out, *questions]:
        assert len(set(question.options)) == len(LABELS), question
        right = [is_right(question.asked, option) for option in question.options]
        assert right == [place == question.answer for place in range(len(LABELS))], question


def test_parities_and_opposites_are_true():
    """The word lists, which the test above believes."""
    assert all(int(number) % 2 == 0 for number in GROUPS["even"])
    assert all(int(number) % 2 == 1 for number in GROUPS["odd"])
    assert all(OPPOSITE[other] == word != other for word, other in OPPOSITE.items())


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_spread_evenly_over_the_labels(questions, skill):
    """Otherwise a model that always says A beats chance. 16.3 is the 99.9% point of chi-square for 3 degrees."""
    counts = Counter(question.label for question in questions if question.skill == skill)
    expected = sum(counts.values()) / len(LABELS)
    assert sum((counts[label] - expected) ** 2 / expected for label in LABELS) < 16.3, counts


def test_training_never_sees_a_held_out_question_in_any_order(held_out, tokenizer):
    """A shared question, options shuffled or not, would turn the held-out accuracy into memory."""
    keys = {question.key for question in held_out}
    assert len(keys) == len(held_out) == EACH * len(SKILLS)
    assert Counter(question.skill for question in held_out) == dict.fromkeys(SKILLS, EACH)
    data = TrainingQuestions(tokenizer, 2000, 0, held_out)
    prompts = {tokenizer.decode(data[i]["input_ids"][1:-1]) for i in range(len(data))}
    assert not prompts & {question.prompt for question in held_out}
    rng = random.Random(2)
    assert not keys & {training_question(rng, keys).key for _ in range(2000)}


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


def test_one_seed_gives_one_task_and_another_gives_another(held_out, tokenizer):
    """The demo's figures can be had again from the seed that the report names."""
    assert held_out_questions(0, EACH) == held_out
    assert held_out_questions(1, EACH) != held_out
    first, again, other = (TrainingQuestions(tokenizer, 50, seed, held_out) for seed in (0, 0, 1))
    assert [first[i] for i in range(50)] == [again[i] for i in range(50)]
    assert [first[i] for i in range(50)] != [other[i] for i in range(50)]


def test_tokenizer_gives_every_text_back(tokenizer, held_out):
    """Byte-level: also text that it was not trained on, and no unknown token anywhere."""
    strange = ["", " ", "\n\n A.B:C?", "naïve ☃ 東京 🙂", "\x00\x7f", "unbelievable 12345"]
    for text in [*strange, *(question.prompt for question in held_out)]:
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_an_answer_is_one_token_and_the_only_one_with_a_loss(tokenizer, held_out):
    """Scoring reads one token's logits, so a label must be one token in its place after the prompt."""
    labels = {label: tokenizer.encode(f" {label}") for label in LABELS}
    assert all(len(ids) == 1 for ids in labels.values())
    assert len({tuple(ids) for ids in labels.values()}) == len(LABELS)
    for question in held_out:
        item = encode_question(tokenizer, question)
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(question.prompt)]
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


def test_quick_run_writes_the_report_and_an_adapter_that_loads(tmp_path):
    """Every stage end to end, as a user starts it. Exit status 0: the reloaded adapter gave the same logits, and all
    losses were finite."""
    (tmp_path / "notes.txt").write_text("mine")
    result = subprocess.run(
        [sys.executable, "-m", "graphmoe_model.demo", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stdout + result.stderr
    report = (tmp_path / "report.md").read_text()
    assert "synthetic" in report
    for plot in ("loss.png", "accuracy.png", "expert_load.png", "latency.png", "comparison.png"):
        assert f"({plot})" in report
        assert (tmp_path / plot).stat().st_size > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
