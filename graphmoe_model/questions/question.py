"""A multiple-choice question, and the text that a model reads of it."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field

LETTERS = tuple(string.ascii_uppercase)
# What every prompt ends in. A space and the label follow.
CUE = "Answer:"


@dataclass(frozen=True)
class Question:
    """A question of which one choice is right.

    Attributes:
        question: what is asked.
        choices: 2 to 26 answers.
        answer: the index of the right one.
        context: what the question is about, before it; may be empty.
        labels: what a model answers with, one for each choice. None: the letters A, B, ..., which then stand before
            the choices in the prompt. Given labels are answers in themselves ("true", "false"), and no choices are
            listed.
        place: where it was read, for messages: file and line, or dataset and row. Two questions that differ in it alone
            are equal.

    Raises:
        ValueError: no question, fewer than 2 choices or more than 26, an empty choice, an answer that is none of them,
            a label that is empty or has space around it, not as many labels as choices, the same one twice, or labels
            that only count the choices, which then no prompt would have.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""
    labels: tuple[str, ...] | None = None
    place: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if not 2 <= len(self.choices) <= len(LETTERS):
            raise ValueError(f"a question needs 2 to {len(LETTERS)} choices, got {len(self.choices)}")
        for i, choice in enumerate(self.choices):
            if not choice.strip():
                raise ValueError(f"choice {i} is empty")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer must be 0 to {len(self.choices) - 1}, got {self.answer}")
        for label in self.labels or ():
            if not label or label != label.strip():  # a space and the label are one token
                raise ValueError(f"the label {label!r} is empty or has space around it")
        if self.labels is not None and not len(self.choices) == len(self.labels) == len(set(self.labels)):
            raise ValueError(f"{len(self.choices)} choices need as many different labels, got {list(self.labels)}")
        if self.labels is not None and _only_count(self.labels) and self.labels != self.choices:
            raise ValueError(
                f"the labels {', '.join(self.labels)} only count the choices, and with labels a prompt lists none; "
                "leave the labels out, and the choices are listed as A, B, ..."
            )

    @property
    def answers(self) -> tuple[str, ...]:
        """The label of each choice."""
        return LETTERS[: len(self.choices)] if self.labels is None else self.labels

    @property
    def label(self) -> str:
        """The right answer's label."""
        return self.answers[self.answer]

    @property
    def prompt(self) -> str:
        """What a model reads: context, question, choices and `CUE`."""
        lines = [self.context.strip()] if self.context.strip() else []
        lines.append(f"Question: {self.question.strip()}")
        if self.labels is None:
            lines += [f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        else:
            lines[-1] += f" ({' or '.join(self.labels)})"
        return "\n".join([*lines, CUE])

    @property
    def solved(self) -> str:
        """The prompt with the right answer."""
        return f"{self.prompt} {self.label}"


def _only_count(labels: Sequence[str]) -> bool:
    """Whether labels are the first letters, or the first digits from 0 or 1, in whatever order."""
    count, found = len(labels), {label.strip("().:").upper() for label in labels}
    digits = [str(number) for number in range(len(LETTERS) + 1)]
    return found in (set(LETTERS[:count]), set(digits[:count]), set(digits[1 : count + 1]))


def prompt_after(shots: Sequence[Question], question: Question) -> str:
    """Return the prompt of ``question`` after the solved ``shots``, an empty line between them."""
    return "\n\n".join([*(shot.solved for shot in shots), question.prompt])


def check_split(name: str, questions: Sequence[Question]) -> None:
    """`ValueError` for a set of questions called ``name`` that is empty."""
    if not questions:
        raise ValueError(f"{name} has no questions; a file or split with at least one is needed")
