"""Questions as text and as tokens: what a model reads is whole at its end, and an answer is one token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from graphmoe_model.questions import Question, QuestionEncoder, check_split
from graphmoe_model.questions.question import prompt_after

QUESTION = Question("Which is an animal?", ("a saw", "a cat"), 1, context="The saw is red.")


def byte_level(special_first: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows letters with a space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([QUESTION.solved, "Answer: A", "Answer: B", "Answer: C"] * 20, trainer)
    if special_first:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


def test_prompt_has_context_question_choices_and_cue():
    assert QUESTION.prompt == "The saw is red.\nQuestion: Which is an animal?\nA. a saw\nB. a cat\nAnswer:"
    assert QUESTION.solved.endswith("Answer: B")


def test_given_labels_are_answers_in_themselves():
    """BoolQ's form: no letters, no list of choices."""
    question = Question("Is a cat an animal?", ("yes", "no"), 0, labels=("true", "false"))
    assert question.prompt == "Question: Is a cat an animal? (true or false)\nAnswer:"
    assert (question.label, question.answers) == ("true", ("true", "false"))


def test_shots_come_solved_and_apart():
    text = prompt_after([QUESTION, QUESTION], QUESTION)
    assert text == f"{QUESTION.solved}\n\n{QUESTION.solved}\n\n{QUESTION.prompt}"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((" ", ("a", "b"), 0), "the question is empty"),
        (("q", ("a",), 0), "2 to 26 choices, got 1"),
        (("q", tuple("a" * 27), 0), "2 to 26 choices, got 27"),
        (("q", ("a", " "), 0), "choice 1 is empty"),
        (("q", ("a", "b"), 2), "must be 0 to 1, got 2"),
        (("q", ("a", "b"), -1), "must be 0 to 1, got -1"),
        (("q", ("a", "b"), 0, "", ("x",)), "as many different labels"),
        (("q", ("a", "b"), 0, "", ("x", "x")), "as many different labels"),
    ],
)
def test_wrong_questions_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        Question(*arguments)


def test_an_empty_split_is_named():
    with pytest.raises(ValueError, match=r"dev\.jsonl has no questions"):
        check_split("dev.jsonl", [])


@pytest.mark.parametrize("special_first", [False, True])
def test_rows_are_prompt_and_one_label(special_first):
    """The loss is on the answer alone; the tokenizer's first token is there exactly where it puts one itself."""
    tokenizer = byte_level(special_first)
    row = QuestionEncoder(tokenizer).training_row(QUESTION)
    assert row["input_ids"] == tokenizer(QUESTION.solved)["input_ids"]
    assert row["labels"][:-1] == [-100] * (len(row["input_ids"]) - 1)
    assert tokenizer.decode(row["labels"][-1:]) == " B"
    whole = QuestionEncoder(tokenizer).training_row(QUESTION, whole_sequence=True)
    assert whole["labels"] == whole["input_ids"] == row["input_ids"]


@pytest.mark.parametrize("special_first", [False, True])
def test_truncation_keeps_the_end_and_the_first_token(special_first):
    tokenizer = byte_level(special_first)
    encoder = QuestionEncoder(tokenizer, max_length=20)
    long = Question(QUESTION.question, QUESTION.choices, 1, context="zzzz " * 100)
    ids = encoder.prompt_ids(long)
    assert len(ids) == 19
    assert encoder.truncated == 1
    assert tokenizer.decode(ids).endswith("Answer:")
    assert (ids[0] == tokenizer.bos_token_id) is special_first
    assert len(encoder.training_row(long)["input_ids"]) == 20


def test_label_of_several_tokens_is_refused():
    encoder = QuestionEncoder(byte_level())
    with pytest.raises(ValueError, match="the label 'unheard' is not one token"):
        encoder.check_labels([Question("q", ("a", "b"), 0, labels=("A", "unheard"))])


def test_label_tokens_follow_the_choices():
    encoder = QuestionEncoder(byte_level())
    assert encoder.label_tokens(QUESTION) == [encoder.label_token("A"), encoder.label_token("B")]


def test_max_length_that_leaves_no_question():
    with pytest.raises(ValueError, match="at least 16 tokens, got 8"):
        QuestionEncoder(byte_level(), max_length=8)
