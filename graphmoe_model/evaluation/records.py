"""What an evaluation found: of each question, and of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

RIGHT = "first_token_right"  # in a task's JSON


@dataclass(frozen=True)
class QuestionRecord:
    """How one question was answered.

    Attributes:
        index: of the question in its task.
        context: the passage before the question; None where it has none.
        question: what was asked.
        labels: what the model could answer.
        answer: index of the right choice.
        first_token: index of the label with the largest logit.
        label_logprobs: log-probability of each label's token after the prompt.
        text: index of the choice with the largest log-likelihood.
        text_norm: the same, each log-likelihood divided by the choice's number of characters.
        text_logprobs: log-likelihood of each choice's text after the cloze prompt.
        votes: of self-consistency, how many samples each label got; None without it.
        voted: index of the label with most votes; None without self-consistency.
    """

    index: int
    context: str | None
    question: str
    labels: list[str]
    answer: int
    first_token: int
    label_logprobs: list[float]
    text: int
    text_norm: int
    text_logprobs: list[float]
    votes: list[int] | None = None
    voted: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class TaskResult:
    """The scores of one task; accuracies from 0 to 1.

    Attributes:
        task: its name.
        questions: how many were answered.
        first_token_accuracy: the label with the largest logit is the right one.
        stderr: standard error of ``first_token_accuracy``; None for a single question.
        acc: the choice whose text has the largest log-likelihood is the right one.
        acc_norm: the same, by the log-likelihood per character.
        self_consistency_accuracy: by the majority of sampled labels; None if none were sampled.
        truncated_prompts: how many prompts lost their start, of twice as many as there are questions.
        seconds: wall-clock time of both scorings.
        questions_sha256: `questions_digest` of what was asked: scores of other questions are not compared.
        records: of each question.
    """

    task: str
    questions: int
    first_token_accuracy: float
    stderr: float | None
    acc: float
    acc_norm: float
    self_consistency_accuracy: float | None
    truncated_prompts: int
    seconds: float
    questions_sha256: str
    records: list[QuestionRecord] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON takes them; of the records whether each first token is right (``1``) or not
        (``0``), in the questions' order: two models' answers to the same questions are compared in pairs."""
        values = {name: value for name, value in vars(self).items() if name not in ("task", "records")}
        if self.self_consistency_accuracy is None:
            del values["self_consistency_accuracy"]
        values[RIGHT] = "".join(str(int(record.first_token == record.answer)) for record in self.records)
        return values


def accuracy(right: Sequence[bool]) -> float:
    """Return the share of right answers."""
    return sum(right) / len(right)


def standard_error(right: Sequence[bool]) -> float | None:
    """Return the standard error of `accuracy`, by the sample's variance as lm-eval has it; None for one answer."""
    count, share = len(right), accuracy(right)
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
