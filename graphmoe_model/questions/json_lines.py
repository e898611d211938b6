"""Questions in a file of JSON lines: one object a line, and every fault named by file and line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from graphmoe_model.messages import shortened
from graphmoe_model.questions.question import Question
from graphmoe_tables.tasks import nearest

NEEDED = ("question", "choices", "answer")
KEYS = (*NEEDED, "context", "labels")
# What other projects' files call these, by the key here; told as a suggestion.
MEANT = {
    **dict.fromkeys(("options", "candidates", "endings", "alternatives"), "choices"),
    **dict.fromkeys(("label", "target", "gold", "correct", "correct_answer", "solution", "answerkey"), "answer"),
    **dict.fromkeys(("passage", "paragraph", "text", "article", "background"), "context"),
    **dict.fromkeys(("prompt", "query", "stem", "question_stem", "input"), "question"),
}


def read_questions(path: Path, *, equal_choices: bool = False) -> tuple[Question, ...]:
    """Return the questions of a UTF-8 file with one JSON object per line; lines of white space are left out.

    The keys of an object are ``question``, ``choices``, ``answer`` (an index from 0, or one of the labels) and, where
    there are any, ``context`` and ``labels`` (without labels the choices are A, B, ...).

    Args:
        path: the file.
        equal_choices: whether a question may have a choice twice, as some of a published task have.

    Raises:
        ValueError: there is no such file or it cannot be read, a line is no such object or has a choice twice (file and
            line are named), or no line has a question.
    """
    questions = tuple(question_of(fields, place) for place, fields in read_objects(path))
    for question in () if equal_choices else questions:
        _check_choices_differ(question)
    if not questions:
        raise ValueError(f"{path} has no questions; write one JSON object per line, with {', '.join(NEEDED)}")
    return questions


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (file and line) and the object of each line that is not white space.

    Raises:
        ValueError: as `read_questions`, but for the objects' content.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _object(line, place)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write questions as `read_questions` reads them, in an order of bytes that is the same on every machine."""
    lines = []
    for question in questions:
        fields: dict[str, Any] = {"context": question.context} if question.context else {}
        fields |= {"question": question.question, "choices": list(question.choices)}
        fields |= {} if question.labels is None else {"labels": list(question.labels)}
        lines.append(json.dumps({**fields, "answer": question.label}, ensure_ascii=False) + "\n")
    path.write_bytes("".join(lines).encode())


def question_of(fields: dict[str, Any], place: str) -> Question:
    """Return the question that an object holds; ``ValueError`` that begins with the place and names the key."""
    for key in fields:
        if key not in KEYS:
            meant = MEANT.get(key.lower())
            hint = nearest(key, KEYS) if meant is None else f", did you mean {meant!r}?"
            raise ValueError(f"{place}: unknown key {key!r}{hint}; there are {', '.join(KEYS)}")
    for key in NEEDED:
        if key not in fields:
            raise ValueError(f"{place}: {key!r} is missing; an object needs {', '.join(NEEDED)}")
    question = _text(fields["question"], "question", place)
    context = _text(fields.get("context", ""), "context", place)
    choices = _texts(fields["choices"], "choices", place)
    labels = _texts(fields["labels"], "labels", place) if "labels" in fields else None
    try:
        read = Question(question, choices, 0, context, labels, place)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return dataclasses.replace(read, answer=_answer(fields["answer"], read.answers, place))


def _check_choices_differ(question: Question) -> None:
    texts = [choice.strip() for choice in question.choices]
    for i, text in enumerate(texts):
        first = texts.index(text)
        if first != i:
            raise ValueError(
                f"{question.place}: choices {first} and {i} are the same, {shortened(text)}, so no answer tells them "
                "apart; change one, or leave the question out"
            )


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig")  # some editors write a mark of the byte order first
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from error
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats)
    except _RepeatedKeyError as error:
        raise ValueError(f"{place}: the key {error.args[0]!r} is there twice") from error
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise ValueError(f"{place}: no JSON object on one line ({error}): {shortened(text.strip())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place}: a JSON object is expected, got {shortened(found)}")
    return found


class _RepeatedKeyError(Exception):
    """A key that an object has twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(key)
        found[key] = value
    return found


def _text(value: Any, key: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key!r} must be a string, got {shortened(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {key!r} has half of a surrogate pair, which is no character") from error
    return value


def _texts(value: Any, key: str, place: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{place}: {key!r} must be a list of strings, got {shortened(value)}")
    return tuple(_text(item, f"{key}[{i}]", place) for i, item in enumerate(value))


def _answer(value: Any, labels: tuple[str, ...], place: str) -> int:
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    raise ValueError(
        f"{place}: 'answer' must be an index from 0 to {len(labels) - 1} or one of {', '.join(labels)}, "
        f"got {shortened(value)}"
    )
