"""Drawn files of questions: refused with file and line, or read as what stands in them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from graphmoe_model.questions import load_questions
from tests.drawing import assert_clear, make_draws
from tests.model.question_draws import files


def check(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.jsonl"
        path.write_bytes(content)
        try:
            found = load_questions(path)
        except Exception as error:
            assert_clear(error, [f"{path} has no questions", *(f"{path}, line {i}: " for i in range(1, 99))])
            return
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert len(found) == len(lines)
    for question, line in zip(found, lines, strict=True):
        row = json.loads(line)
        assert (question.question, question.context) == (row["question"], row.get("context", ""))
        assert list(question.choices) == row["choices"]
        labels = row.get("labels", [chr(ord("A") + i) for i in range(len(row["choices"]))])
        assert list(question.answers) == labels
        assert row["answer"] in (question.answer, question.label)
        assert not isinstance(row["answer"], bool)
        assert question.solved.endswith(f"\nAnswer: {question.label}")
        question.solved.encode()  # a tokenizer takes it


def test_drawn_files():
    make_draws(check, files(), examples=150, seed=51)


@pytest.mark.slow
def test_many_drawn_files():
    make_draws(check, files(), examples=2000, seed=1)
