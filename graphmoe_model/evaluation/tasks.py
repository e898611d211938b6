"""Questions as lm-eval's tasks, one for each scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from graphmoe_model.evaluation.prompts import Shots, cloze_after
from graphmoe_model.questions import Question, QuestionEncoder, check_split
from graphmoe_model.questions.question import prompt_after

FIRST_TOKEN, TEXT = "first token", "text"


@dataclass(frozen=True)
class EvaluationTask:
    """Questions under a name.

    Attributes:
        name: of the task.
        questions: what is asked, at least one.
        examples: the training split, which solved examples are drawn from.
        examples_from: what messages call that split, or the file that stands for it.

    Raises:
        ValueError: no questions.
    """

    name: str
    questions: Sequence[Question]
    examples: Sequence[Question] = ()
    examples_from: str = "its training split"

    def __post_init__(self) -> None:
        check_split(self.name, self.questions)


class EncodedTask:
    """A task's prompts and answers in each scoring that is asked for, as tokens.

    Args:
        task: the questions.
        encoder: of the model's tokenizer.
        shots: K, how many solved examples stand before each question.
        seed: of their choice.
        scorings: `FIRST_TOKEN`, `TEXT` or both; what the other one would need is not encoded.

    Raises:
        ValueError: fewer examples than ``shots``, a label that is not one token, or for `TEXT` a choice that has no
            tokens of its own.
    """

    def __init__(
        self, task: EvaluationTask, encoder: QuestionEncoder, shots: int, seed: int, scorings: Sequence[str]
    ) -> None:
        self.task = task
        cut_before = encoder.truncated
        encoder.check_labels(task.questions)
        choose = Shots(task.name, task.examples, shots, seed, task.examples_from)
        self._rows: dict[str, list[dict[str, Any]]] = {scoring: [] for scoring in scorings}
        for question in task.questions:
            before = choose.of(question)
            for scoring, rows in self._rows.items():
                rows.append(_ROWS[scoring](question, before, encoder))
        self.truncated = encoder.truncated - cut_before

    @property
    def largest_token(self) -> int:
        """The largest id of all prompts and answers."""
        return max(
            max(*row["prompt_ids"], *(token for ids in row["choice_ids"] for token in ids))
            for rows in self._rows.values()
            for row in rows
        )

    def name(self, scoring: str) -> str:
        """Return what lm-eval calls the task in a scoring."""
        return f"{self.task.name} ({scoring})"

    def configs(self) -> list[dict[str, Any]]:
        """Return lm-eval's configuration of the task in each scoring, with its data in memory."""
        return [self._config(scoring) for scoring in self._rows]

    def _config(self, scoring: str) -> dict[str, Any]:
        split = Dataset.from_list(self._rows[scoring])

        def questions(**_: Any) -> dict[str, Dataset]:
            return {"test": split}

        return {
            "task": self.name(scoring),
            "custom_dataset": questions,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        }


def _label_row(question: Question, before: Sequence[Question], encoder: QuestionEncoder) -> dict[str, Any]:
    """The prompt with its choices, answered by the token of a label."""
    labels = [[token] for token in encoder.label_tokens(question)]
    return _row(question, question.answers, prompt_after(before, question), encoder, labels)


def _text_row(question: Question, before: Sequence[Question], encoder: QuestionEncoder) -> dict[str, Any]:
    """The prompt without its choices, answered by the text of one."""
    texts = [choice.strip() for choice in question.choices]
    answers = [encoder.answer_ids(text) for text in texts]
    return _row(question, texts, cloze_after(before, question), encoder, answers)


_ROWS = {FIRST_TOKEN: _label_row, TEXT: _text_row}


def _row(
    question: Question, choices: Sequence[str], prompt: str, encoder: QuestionEncoder, answers: list[list[int]]
) -> dict[str, Any]:
    """One document. All choices are scored after the same tokens: room is left for the longest of them."""
    return {
        "prompt": prompt,
        "choices": list(choices),
        "answer": question.answer,
        "prompt_ids": encoder.fitted_ids(prompt, max(map(len, answers))),
        "choice_ids": answers,
    }
