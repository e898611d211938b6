"""Questions as token ids: prompts that are never cut at their end, and answers of one token each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from graphmoe_model.questions.question import CUE, Question, prompt_after

IGNORED = -100  # the label of a token that no loss is computed on


class QuestionEncoder:
    """Encodes questions for one tokenizer.

    A prompt that is longer than it may be loses tokens at its start (examples and context first), after the tokenizer's
    own first token, so that the question's end, its choices and the answer's cue stay.

    Args:
        tokenizer: of the model that answers.
        max_length: tokens of prompt and answer together, at least 16.

    Attributes:
        truncated: how many prompts were too long so far.

    Raises:
        ValueError: ``max_length`` below 16, or a tokenizer that has no ids for text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> None:
        if max_length < 16:
            raise ValueError(f"max_length must be at least 16 tokens, got {max_length}: questions would lose their end")
        self.tokenizer, self.max_length, self.truncated = tokenizer, max_length, 0
        self._cue = self._text_ids(CUE)
        self._first = self._special_first()
        self._labels: dict[str, int] = {}

    def label_token(self, label: str) -> int:
        """Return the id of the one token that a space and ``label`` are after the cue.

        Raises:
            ValueError: they are several tokens, or none of their own: the model cannot answer with one.
        """
        if label not in self._labels:
            ids = self._text_ids(f"{CUE} {label}")
            own = ids[len(self._cue) :]
            if ids[: len(self._cue)] != self._cue or len(own) != 1:
                pieces = self.tokenizer.convert_ids_to_tokens(ids)
                raise ValueError(
                    f"the label {label!r} is not one token of {self.tokenizer.name_or_path or 'this tokenizer'} after "
                    f"{CUE!r}: {pieces}; answers are compared by one token, so use labels that are one, such as letters"
                )
            self._labels[label] = own[0]
        return self._labels[label]

    def check_labels(self, questions: Iterable[Question]) -> None:
        """`ValueError` unless every label is one token, and no two labels of a question are the same one.

        It names the place of the first question that has such a label.
        """
        seen: set[tuple[str, ...]] = set()
        for question in questions:
            if question.answers not in seen:
                seen.add(question.answers)
                try:
                    self._check_answers(question.answers)
                except ValueError as error:
                    raise ValueError(f"{question.place}: {error}" if question.place else str(error)) from error

    def _check_answers(self, answers: tuple[str, ...]) -> None:
        tokens: dict[int, str] = {}
        for label in answers:
            other = tokens.setdefault(self.label_token(label), label)
            if other != label:
                raise ValueError(f"the labels {other!r} and {label!r} are the same token for this tokenizer")

    def label_tokens(self, question: Question) -> list[int]:
        """Return the token of each choice's label, in the choices' order."""
        return [self.label_token(label) for label in question.answers]

    def prompt_ids(self, question: Question, shots: Sequence[Question] = ()) -> list[int]:
        """Return the ids that a model reads before its answer, at most ``max_length - 1``."""
        return self.fitted_ids(prompt_after(shots, question), answer_tokens=1)

    def fitted_ids(self, text: str, answer_tokens: int) -> list[int]:
        """Return the ids of a prompt, cut at its start where it and an answer of that many tokens would be too long.

        Raises:
            ValueError: the answer alone fills ``max_length``.
        """
        ids, room = self._text_ids(text), self.max_length - answer_tokens - len(self._first)
        if room < 1:
            raise ValueError(f"an answer has {answer_tokens} tokens, and a prompt with it may have {self.max_length}")
        if len(ids) > room:
            self.truncated += 1
            ids = ids[-room:]
        return [*self._first, *ids]

    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids that a space and ``answer`` are after the cue.

        Raises:
            ValueError: the tokenizer makes one token of the cue's end and the answer's start.
        """
        ids = self._text_ids(f"{CUE} {answer}")
        if ids[: len(self._cue)] != self._cue or len(ids) == len(self._cue):
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            raise ValueError(
                f"the answer {answer!r} has no tokens of its own after {CUE!r} for this tokenizer: {pieces}"
            )
        return ids[len(self._cue) :]

    def training_row(self, question: Question, whole_sequence: bool = False) -> dict[str, list[int]]:
        """Return ``input_ids`` of prompt and right answer, and ``labels``: the loss is on the answer alone, or with
        ``whole_sequence`` on every token but the first."""
        prompt, answer = self.prompt_ids(question), self.label_token(question.label)
        ids = [*prompt, answer]
        return {"input_ids": ids, "labels": ids if whole_sequence else [IGNORED] * len(prompt) + [answer]}

    def _text_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"the tokenizer makes no tokens of {text!r}; pass the model's own")
        return list(ids)

    def _special_first(self) -> list[int]:
        """What the tokenizer itself puts before a text (a beginning-of-sequence token, mostly)."""
        whole, own = list(self.tokenizer(CUE)["input_ids"]), self._cue
        start = next((i for i in range(len(whole)) if whole[i : i + len(own)] == own), 0)
        return whole[:start]
