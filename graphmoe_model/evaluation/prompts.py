"""What a model reads in each scoring: which solved examples come first, and a question without its choices."""

from __future__ import annotations

import random
from collections.abc import Sequence

from graphmoe_model.questions import Question
from graphmoe_model.questions.question import CUE


def cloze_prompt(question: Question) -> str:
    """Return context, question and cue without the choices, which follow as texts."""
    lines = [question.context.strip()] if question.context.strip() else []
    return "\n".join([*lines, f"Question: {question.question.strip()}", CUE])


def cloze_after(shots: Sequence[Question], question: Question) -> str:
    """Return the cloze prompt of ``question`` after the ``shots`` with their right choices' texts."""
    solved = [f"{cloze_prompt(shot)} {shot.choices[shot.answer].strip()}" for shot in shots]
    return "\n\n".join([*solved, cloze_prompt(question)])


class Shots:
    """Chooses the solved examples that stand before a question.

    Each question gets its own draw. It depends on the seed and on the question alone, not on what is evaluated beside
    it, so that a part of a set is scored as in the whole set.

    Args:
        name: the set's, for errors.
        examples: what is drawn from, the training split; those that occur twice count once.
        count: K, how many examples each question gets.
        seed: of the draw.
        source: what errors call the examples.
    """

    def __init__(
        self, name: str, examples: Sequence[Question], count: int, seed: int, source: str = "its training split"
    ) -> None:
        self.name, self.count, self.seed, self.source = name, count, seed, source
        self._examples = list(dict.fromkeys(examples))

    def of(self, question: Question) -> list[Question]:
        """Return the examples before a question, never the question itself.

        Raises:
            ValueError: there are fewer examples than are asked for.
        """
        if self.count == 0:
            return []
        others = [example for example in self._examples if not _same(example, question)]
        if len(others) < self.count:
            without = "" if len(others) == len(self._examples) else " besides the question itself"
            raise ValueError(
                f"{self.count} examples (shots) were asked for before each question of {self.name}, and "
                f"{self.source} has {len(others)}{without}; ask for fewer, or name where there are more"
            )
        return random.Random(f"{self.seed} {question.prompt}").sample(others, self.count)


def _same(one: Question, other: Question) -> bool:
    """The same question, whatever answer is said to be right."""
    return (one.question, one.choices, one.context) == (other.question, other.choices, other.context)
