"""Questions that belong together, and where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphmoe_model.questions.question import Question, check_split


def questions_digest(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of all that questions say, in their order; where they were read does not count."""
    rows = [[each.question, each.choices, each.answer, each.context, each.labels] for each in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def count_shared(asked: Sequence[Question], trained: Sequence[Question]) -> int:
    """Count the questions that were also trained on: the same text, choices and context, whatever the answer."""
    known = {(each.question, each.choices, each.context) for each in trained}
    return sum((each.question, each.choices, each.context) in known for each in asked)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one split of a task, or of one file.

    Attributes:
        name: the task's, or the file's without its ending.
        split: the task's split, as its source calls it. A file is a split of its own: it has the file's name.
        source: where the questions were read, for messages and results: a file, or a dataset with its revision.
        questions: at least one. Each says in ``place`` which row of the source it is.

    Raises:
        ValueError: there are no questions.
    """

    name: str
    split: str
    source: str
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        check_split(self.source, self.questions)

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[Question]:
        return iter(self.questions)
