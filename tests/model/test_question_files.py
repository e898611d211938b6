"""Files of questions: their form is read in full, and every fault is told with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from graphmoe_model.questions import Question, QuestionEncoder, load_questions
from graphmoe_model.questions.json_lines import write_questions
from graphmoe_tables.tasks import TASKS
from tests.model.test_questions import byte_level

GOOD = {"question": "Which floats?", "choices": ["iron", "cork"], "answer": 1}


def written(folder: Path, *lines: object, name: str = "mine.jsonl") -> Path:
    """A file of these lines: bytes as they are, anything else as JSON."""
    path = folder / name
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def test_the_form_of_a_row(tmp_path):
    """What docs/questions.md says: answers as index or label, an optional context, labels of one's own."""
    path = written(
        tmp_path,
        GOOD,
        {**GOOD, "answer": "A", "context": "Cork is light."},
        {"question": "Is it so?", "choices": ["yes", "no"], "labels": ["true", "false"], "answer": "false"},
    )
    assert load_questions(path).questions == (
        Question("Which floats?", ("iron", "cork"), 1),
        Question("Which floats?", ("iron", "cork"), 0, "Cork is light."),
        Question("Is it so?", ("yes", "no"), 1, labels=("true", "false")),
    )


def test_a_set_says_where_it_comes_from(tmp_path):
    path = written(tmp_path, GOOD, b"", GOOD)
    found = load_questions(str(path), "train")
    assert (found.name, found.split, found.source, len(found)) == ("mine", "mine", str(path), 2)
    assert [question.place for question in found] == [f"{path}, line 1", f"{path}, line 3"]  # empty lines count


def test_what_editors_and_other_systems_write_is_read(tmp_path):
    """A mark of the byte order, line ends of Windows, a last line without an end, U+2028 inside a string."""
    row = json.dumps({**GOOD, "question": "Which\u2028floats?"}, ensure_ascii=False).encode()
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row)
    assert [question.question for question in load_questions(path)] == ["Which\u2028floats?"] * 2


def test_a_published_tasks_file_may_have_a_choice_twice(tmp_path, monkeypatch):
    """Its questions are as they were; by a task's name alone, as a file of one's own is refused."""
    twice = {**GOOD, "choices": ["iron", "cork", "iron"]}
    written(tmp_path, *[twice] * TASKS["quartz"].splits["validation"], name="validation.jsonl")
    (tmp_path / "quartz").mkdir()
    (tmp_path / "validation.jsonl").rename(tmp_path / "quartz" / "validation.jsonl")
    monkeypatch.setenv("GRAPHMOE_DATA", str(tmp_path))
    assert load_questions("quartz:validation").questions[0].choices == ("iron", "cork", "iron")


def test_labels_may_be_the_choices_themselves(tmp_path):
    """Then nothing is lost where they are numbers."""
    row = {"question": "How many?", "choices": ["1", "2"], "labels": ["1", "2"], "answer": "2"}
    assert load_questions(written(tmp_path, row)).questions[0].prompt.startswith("Question: How many? (1 or 2)")


def test_written_questions_are_read_back(tmp_path):
    questions = [
        Question("Which floats?", ("iron", "Kork ↑"), 1, "Cörk."),
        Question("Is it so?", ("yes", "no"), 0, labels=("true", "false")),
    ]
    write_questions(tmp_path / "own.jsonl", questions)
    assert list(load_questions(tmp_path / "own.jsonl")) == questions


@pytest.mark.parametrize(
    "line, told",
    [
        (b"{", "no JSON object on one line (Expecting property name"),
        (b'{"question": "a"} {', "no JSON object on one line (Extra data"),
        (b"[" * 100_000, "no JSON object on one line (maximum recursion depth"),
        (b'{"answer": ' + b"9" * 5000 + b"}", "no JSON object on one line (Exceeds the limit"),
        (b'{"question": "\xff"}', "not UTF-8 (invalid start byte at byte 14); save the file as UTF-8"),
        (b'{"answer": 0, "answer": 1}', "the key 'answer' is there twice"),
        ([1, 2], "a JSON object is expected, got [1, 2]"),
        ("text", "a JSON object is expected, got 'text'"),
        ({**GOOD, "anwser": 1}, "unknown key 'anwser', did you mean 'answer'?; there are question, choices, answer"),
        ({**GOOD, "options": []}, "unknown key 'options', did you mean 'choices'?; there are"),
        ({**GOOD, "answerKey": "A"}, "unknown key 'answerKey', did you mean 'answer'?; there are"),
        ({**GOOD, "passage": "A"}, "unknown key 'passage', did you mean 'context'?; there are"),
        ({**GOOD, "choices": ["a", "b", " a "]}, "choices 0 and 2 are the same, 'a', so no answer tells them apart"),
        ({**GOOD, "labels": ["A", "B"]}, "only count the choices, and with labels a prompt lists none; leave the"),
        ({**GOOD, "labels": ["2.", "1."]}, "the labels 2., 1. only count the choices"),
        ({**GOOD, "labels": ["0", "1"]}, "the labels 0, 1 only count the choices"),
        ({**GOOD, "zzz": 1}, "unknown key 'zzz'; there are question, choices, answer, context, labels"),
        ({"question": "q", "choices": ["a", "b"]}, "'answer' is missing; an object needs question, choices, answer"),
        ({"question": "q", "answer": 1}, "'choices' is missing"),
        ({"choices": ["a", "b"], "answer": 1}, "'question' is missing"),
        ({**GOOD, "question": 3}, "'question' must be a string, got 3"),
        ({**GOOD, "question": " "}, "the question is empty"),
        ({**GOOD, "question": "\ud800"}, "'question' has half of a surrogate pair"),
        ({**GOOD, "context": None}, "'context' must be a string, got None"),
        ({**GOOD, "choices": "ab"}, "'choices' must be a list of strings, got 'ab'"),
        ({**GOOD, "choices": {"A": "a"}}, "'choices' must be a list of strings"),
        ({**GOOD, "choices": ["a", 2]}, "'choices[1]' must be a string, got 2"),
        ({**GOOD, "choices": ["a", ""]}, "choice 1 is empty"),
        ({**GOOD, "choices": ["a"], "answer": 0}, "a question needs 2 to 26 choices, got 1"),
        ({**GOOD, "choices": []}, "a question needs 2 to 26 choices, got 0"),
        ({**GOOD, "choices": ["a"] * 27}, "a question needs 2 to 26 choices, got 27"),
        ({**GOOD, "answer": 2}, "'answer' must be an index from 0 to 1 or one of A, B, got 2"),
        ({**GOOD, "answer": -1}, "'answer' must be an index from 0 to 1 or one of A, B, got -1"),
        ({**GOOD, "answer": "C"}, "'answer' must be an index from 0 to 1 or one of A, B, got 'C'"),
        ({**GOOD, "answer": "b"}, "one of A, B, got 'b'"),
        ({**GOOD, "answer": "1"}, "one of A, B, got '1'"),
        ({**GOOD, "answer": True}, "one of A, B, got True"),
        ({**GOOD, "answer": 1.0}, "one of A, B, got 1.0"),
        ({**GOOD, "answer": None}, "one of A, B, got None"),
        ({**GOOD, "labels": ["x", "y"], "answer": "A"}, "one of x, y, got 'A'"),
        ({**GOOD, "labels": ["x"]}, "2 choices need as many different labels, got ['x']"),
        ({**GOOD, "labels": ["x", "x"]}, "2 choices need as many different labels, got ['x', 'x']"),
        ({**GOOD, "labels": ["x", ""]}, "the label '' is empty or has space around it"),
        ({**GOOD, "labels": ["x", " y"]}, "the label ' y' is empty or has space around it"),
        ({**GOOD, "labels": "xy"}, "'labels' must be a list of strings, got 'xy'"),
    ],
)
def test_a_fault_is_told_with_file_and_line(line, told, tmp_path):
    path = written(tmp_path, GOOD, GOOD, line)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 3: ") as error:
        load_questions(path)
    assert told in str(error.value)
    assert len(str(error.value)) < 500  # a line of megabytes is not repeated


def test_files_that_are_none_are_named(tmp_path, monkeypatch):
    empty = written(tmp_path, b"  ", b"", name="empty.jsonl")
    for path, told in (
        (tmp_path, f"{tmp_path} is a folder; name one file of questions in it"),
        (tmp_path / "none.jsonl", f"there is no file {tmp_path / 'none.jsonl'}"),
        (empty / "below", f"there is no file {empty / 'below'}"),
        (empty, f"{empty} has no questions; write one JSON object per line"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            load_questions(path)


def test_an_unknown_task_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^unknown task 'bolq', did you mean 'boolq'\?; there are arc_easy, "
    ) as error:
        load_questions("bolq:train")
    assert all(name in str(error.value) for name in TASKS)
    with pytest.raises(ValueError, match=r"unknown task 'zzzz'; there are arc_easy"):
        load_questions("zzzz")


def test_an_unknown_split_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no split 'dev' with answers; it has train, validation, test \(test for ev"):
        load_questions("arc_easy:dev")


def test_a_file_may_be_called_as_a_task_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, GOOD, name="boolq")
    assert len(load_questions("./boolq")) == 1


def test_a_label_of_several_tokens_is_told_with_its_line(tmp_path):
    """Before training starts: found in the middle of it, hours would be lost."""
    path = written(tmp_path, GOOD, {**GOOD, "labels": ["A", "zebra"]}, {**GOOD, "labels": ["A", "ox"]})
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 2: the label 'zebra' is not one token of"):
        QuestionEncoder(byte_level()).check_labels(load_questions(path))
