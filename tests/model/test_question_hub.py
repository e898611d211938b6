"""The eight tasks of the hub: each dataset's own fields and labels become the same kind of question, or are refused.

Rows are made up; schemas and forms of labels are those of the datasets' cards (tests/model/hub_stand_in.py).
"""

from __future__ import annotations

import re

import pytest
from huggingface_hub import constants

from graphmoe_model.questions import load_questions
from graphmoe_tables.tasks import TASKS, HubSource
from tests.model.hub_stand_in import (
    COMMIT,
    ROWS,
    SCHEMAS,
    TEXT,
    arc_row,
    boolq_row,
    hellaswag_row,
    piqa_row,
    put,
    social_row,
    wino_row,
)

HUB_TASKS = [name for name, task in TASKS.items() if isinstance(task.source, HubSource)]
ARC = "Question: Which stone floats?\nA. stone A\nB. stone B\nC. stone C\nD. stone D\nAnswer: C"
NUMBERED = "Question: Which stone floats?\nA. stone 1\nB. stone 2\nC. stone 3\nD. stone 4\nAnswer: "
CUP = (
    "The cup did not fit the box, as the _ was too big.\nQuestion: Who or what belongs in the blank?\nA. cup\nB. box\n"
)
# The first row of each task as a model reads it, with its answer.
FIRST = {
    "arc_easy": ARC,
    "arc_challenge": ARC.removesuffix("C") + "A",
    "boolq": "A cup is a small vessel.\nQuestion: is a cup a vessel (true or false)\nAnswer: true",
    "openbookqa": "Question: Water is\nA. stone A\nB. stone B\nC. stone C\nD. stone D\nAnswer: D",
    "piqa": "Question: To dry a cup,\nA. wipe it with a towel.\nB. fill it with water.\nAnswer: A",
    "social_iqa": "Kim won a cup.\nQuestion: How would Kim feel?\nA. sad\nB. glad\nC. cold\nAnswer: A",
    "hellaswag": "She mixes flour. then\nQuestion: Which text comes next?\nA. she bakes.\nB. she swims.\nC. it rains.\n"
    "D. he sings.\nAnswer: A",
    "winogrande": CUP + "Answer: A",
}
ANSWERS = {
    "arc_easy": ["C", "B", "E", "B"],
    "arc_challenge": ["A", "D"],
    "boolq": ["true", "false"],  # by words
    "openbookqa": ["D"],
    "piqa": ["A", "B"],
    "social_iqa": ["A", "B", "C"],
    "hellaswag": ["A", "D"],
    "winogrande": ["A", "B"],
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client, which is offline in tests."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", HUB_TASKS)
def test_rows_of_every_task_are_read(name, cache):
    """A field or a label read wrongly would be trained on, and no error would say so."""
    put(cache, name, TASKS[name].evaluation, ROWS[name])
    found = load_questions(name)
    assert found.questions[0].solved == FIRST[name]
    assert [question.label for question in found] == ANSWERS[name]
    assert (found.name, found.split) == (name, TASKS[name].evaluation)
    assert found.source.endswith(f"{found.split}, refs/convert/parquet {COMMIT}")  # so that results name their data
    source = TASKS[name].source
    assert found.questions[-1].place.startswith(source.repository)
    assert found.questions[-1].place.endswith(f"{found.split}, row {len(ROWS[name]) - 1}")


def test_arc_with_numbers_becomes_letters(cache):
    """Some rows of ARC are labelled 1 to 4; one prompt form has letters in all of them."""
    put(cache, "arc_easy", "test", ROWS["arc_easy"])
    assert load_questions("arc_easy").questions[1].solved == NUMBERED + "B"


@pytest.mark.parametrize("asked", [("arc_easy", "train"), ("arc_easy:train", "test"), ("arc_easy:train",)])
def test_a_split_is_named_beside_the_task_or_with_it(asked, cache):
    put(cache, "arc_easy", "train", [arc_row("D")])
    put(cache, "arc_easy", "test", [arc_row("A")])
    assert [question.label for question in load_questions(*asked)] == ["D"]


def test_a_space_around_a_label_is_no_part_of_it(cache):
    put(cache, "social_iqa", "validation", [social_row("2\n")])
    assert load_questions("social_iqa").questions[0].label == "B"


@pytest.mark.parametrize(
    "name, row, told",
    [
        ("arc_easy", arc_row("F"), "'answerKey' must be one of A, B, C, D, got 'F'"),
        ("arc_easy", arc_row("1"), "'answerKey' must be one of A, B, C, D, got '1'"),
        ("arc_easy", arc_row("A", question=""), "the question is empty"),
        ("arc_easy", arc_row("A", question=None), "'question' must be a string, got None"),
        ("arc_easy", arc_row("A", choices={"text": ["a"], "label": ["A", "B"]}), "1 texts and 2 labels"),
        ("arc_easy", arc_row("A", choices={"text": ["a"], "label": ["A"]}), "2 to 26 choices, got 1"),
        ("arc_easy", arc_row("A", choices={"text": ["a", ""], "label": ["A", "B"]}), "choice 1 is empty"),
        ("boolq", boolq_row(None), "'answer' must be true or false, got None"),
        ("social_iqa", social_row("4"), "'label' must be one of 1, 2, 3, got '4'"),
        ("social_iqa", social_row("A"), "'label' must be one of 1, 2, 3, got 'A'"),
        ("hellaswag", hellaswag_row("4"), "'label' must be one of 0, 1, 2, 3, got '4'"),
        ("hellaswag", hellaswag_row("0", endings=["x", None]), "'endings[1]' must be a string, got None"),
        ("hellaswag", hellaswag_row("0", endings=None), "'endings' must be a list of strings, got None"),
        ("winogrande", wino_row("0"), "'answer' must be one of 1, 2, got '0'"),
        ("winogrande", wino_row("1", "No blank."), "'sentence' has no blank (_): 'No blank.'"),
    ],
)
def test_a_fault_is_told_with_dataset_and_row(name, row, told, cache):
    split = TASKS[name].evaluation
    put(cache, name, split, [ROWS[name][0], row])
    source = TASKS[name].source
    place = f"{source.repository} ({source.configuration}), {split}, row 1: "
    with pytest.raises(ValueError, match=f"^{re.escape(place)}") as error:
        load_questions(name)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "name, row", [("piqa", piqa_row(-1)), ("hellaswag", hellaswag_row("")), ("winogrande", wino_row(""))]
)
def test_rows_without_an_answer_are_refused_with_what_to_do(name, row, cache):
    """The hub's test splits of these have no answers; reading -1 as the last choice would look like a result."""
    put(cache, name, "validation", [row])
    with pytest.raises(ValueError, match=r"validation, row 0: '(label|answer)' has no answer \(.*choose a split whose"):
        load_questions(name)
    with pytest.raises(ValueError, match=f"the task {name} has no split 'test' with answers; it has train, validation"):
        load_questions(name, "test")


def test_a_missing_field_is_named_with_those_there_are(cache):
    rows = [{"goal": "To dry a cup,", "solution": "wipe it"}]
    put(cache, "piqa", "validation", rows, {"goal": TEXT, "solution": TEXT})
    with pytest.raises(ValueError, match=r"row 0: 'sol1' is missing; there are goal, solution"):
        load_questions("piqa")


def test_an_empty_split_is_refused(cache):
    put(cache, "piqa", "validation", [])
    with pytest.raises(ValueError, match=r"ybisk/piqa \(plain_text\), validation.* has no questions"):
        load_questions("piqa")


def test_a_damaged_file_is_named(cache):
    put(cache, "boolq", "validation", ROWS["boolq"]).write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"0000\.parquet cannot be read as Parquet .*delete it and try again"):
        load_questions("boolq")


@pytest.mark.parametrize("name", HUB_TASKS)
def test_without_the_hub_what_to_do_is_said(name, cache):
    """Not by a trace of the client's."""
    with pytest.raises(ValueError, match=f"^{name} cannot be had from the hub") as error:
        load_questions(name)
    for part in (TASKS[name].source.repository, "HF_HOME", "HF_HUB_OFFLINE", "graphmoe data fetch", ".jsonl"):
        assert part in str(error.value)


def test_another_split_in_the_cache_is_not_taken_for_the_one_asked_for(cache):
    """Offline, the hub's client returns the snapshot that it has, whatever was asked of it."""
    put(cache, "arc_easy", "train", ROWS["arc_easy"])
    with pytest.raises(ValueError, match=r"allenai/ai2_arc has no ARC-Easy/test/\*\.parquet"):
        load_questions("arc_easy")
    with pytest.raises(ValueError, match=r"allenai/ai2_arc has no ARC-Challenge/train/\*\.parquet"):
        load_questions("arc_challenge", "train")


def test_what_is_missing_to_read_them_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"the task boolq is read by the package datasets: pip install 'graphmoe\[train\]"
    ):
        load_questions("boolq")


def test_every_task_of_the_hub_has_a_schema_here():
    assert set(SCHEMAS) == set(ROWS) == set(FIRST) == set(ANSWERS) == set(HUB_TASKS)
