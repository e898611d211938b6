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


READERS: dict[str, Callable[[Path], list[Question]]] = {"quartz": read_quartz, "social_iqa_small": read_social_iqa}


def _read(path: Path, pattern: re.Pattern[str]) -> list[Question]:
    return [_question(fields, pattern, place) for place, fields in read_objects(path)]


def _question(fields: dict[str, Any], pattern: re.Pattern[str], place: str) -> Question:
    try:
        text, ideal = fields["input"][-1]["content"], fields["ideal"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{place}: 'input' with a message's 'content' and 'ideal' are expected") from error
    match = pattern.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{place}: no question with choices A, B, ...: {shortened(text)}")
    named = match.groupdict()
    choices = tuple(part.strip() for part in match.groups()[len(named) :])
    if ideal not in LETTERS[: len(choices)]:
        raise ValueError(
            f"{place}: 'ideal' must be one of {', '.join(LETTERS[: len(choices)])}, got {shortened(ideal)}"
        )
    return Question(named["question"], choices, LETTERS.index(ideal), named.get("context", ""), place=place)
