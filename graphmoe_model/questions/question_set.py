"""Questions that belong together, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from graphmoe_model.questions.question import Question, check_split


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
