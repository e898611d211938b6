"""The questions of the package index's files: rows of a chat that are put back into question, choices and answer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphmoe_model.messages import shortened
from graphmoe_model.questions import Question
from graphmoe_model.questions.json_lines import read_objects
from graphmoe_model.questions.question import LETTERS

QUARTZ = re.compile(r"(?P<question>.+)\n\n A: (.+)\n B: (.+)")
# The question is the last sentence of what stands before the choices.
SOCIAL_IQA = re.compile(
    r"(?P<context>.+?)\s+(?P<question>(?:What|How|Why|Who|Where|When|Which)\b[^.!?]*\?)\s+A: (.+); B: (.+); C: (.+)\.",
    re.DOTALL,  # one context has lines
)

HEADLINES = 5000  # of 28,614: as many as a CPU can be asked to train on and to answer
JOKE, JOKE_ANSWERS = "Is this headline a joke?", ("no", "yes")


def read_quartz(path: Path) -> list[Question]:
    """Return the questions of QuaRTz, without those that are there with both answers: they have none.

    The file has no paragraphs, and which of the two answers is right depended on the paragraph.
    """
    found = _read(path, QUARTZ)
    answers: dict[tuple[str, tuple[str, ...]], set[int]] = defaultdict(set)
    for question in found:
        answers[question.question, question.choices].add(question.answer)
    return [question for question in found if len(answers[question.question, question.choices]) == 1]


def read_social_iqa(path: Path) -> list[Question]:
    """Return the questions of Social IQA, each with its context."""
    return _read(path, SOCIAL_IQA)


def read_headlines(path: Path) -> list[Question]:
    """Return questions on the first `HEADLINES` different headlines: whether each is a joke, by its first row."""
    found: dict[str, Question] = {}
    for place, fields in read_objects(path):
        text, ideal = _text_and_answer(fields, place)
        if ideal not in ("0", "1"):
            raise ValueError(f"{place}: 'ideal' must be 0 or 1, got {shortened(ideal)}")
        found.setdefault(text, Question(JOKE, JOKE_ANSWERS, int(ideal), text, JOKE_ANSWERS, place))
        if len(found) == HEADLINES:
            break
    return list(found.values())


READERS: dict[str, Callable[[Path], list[Question]]] = {
    "quartz": read_quartz,
    "social_iqa_small": read_social_iqa,
    "headlines": read_headlines,
}


def _read(path: Path, pattern: re.Pattern[str]) -> list[Question]:
    return [_question(fields, pattern, place) for place, fields in read_objects(path)]


def _text_and_answer(fields: dict[str, Any], place: str) -> tuple[str, Any]:
    try:
        text, ideal = fields["input"][-1]["content"], fields["ideal"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{place}: 'input' with a message's 'content' and 'ideal' are expected") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: 'content' must be a text, got {shortened(text)}")
    return text, ideal


def _question(fields: dict[str, Any], pattern: re.Pattern[str], place: str) -> Question:
    text, ideal = _text_and_answer(fields, place)
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"{place}: no question with choices A, B, ...: {shortened(text)}")
    named = match.groupdict()
    choices = tuple(part.strip() for part in match.groups()[len(named) :])
    if ideal not in LETTERS[: len(choices)]:
        raise ValueError(
            f"{place}: 'ideal' must be one of {', '.join(LETTERS[: len(choices)])}, got {shortened(ideal)}"
        )
    return Question(named["question"], choices, LETTERS.index(ideal), named.get("context", ""), place=place)
