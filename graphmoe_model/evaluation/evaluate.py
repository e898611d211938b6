"""Questions answered by a model, by lm-eval's `simple_evaluate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from graphmoe_model.evaluation.language_model import Progress, QuestionLM, quiet_lm_eval
from graphmoe_model.evaluation.records import QuestionRecord, TaskResult, accuracy, standard_error
from graphmoe_model.evaluation.tasks import FIRST_TOKEN, TEXT, EncodedTask, EvaluationTask
from graphmoe_model.evaluation.voting import SelfConsistency, majority
from graphmoe_model.questions import Question, QuestionEncoder, questions_digest


def evaluate_questions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EvaluationTask],
    *,
    shots: int = 0,
    self_consistency: SelfConsistency | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Score a model on tasks, by the first token of its answers and by the log-likelihood of the choices' texts.

    Args:
        model: a causal language model with or without adapters; it is set to evaluation mode.
        tokenizer: of that model.
        tasks: each with a name of its own.
        shots: K, how many solved examples stand before each question.
        self_consistency: whether answers are sampled besides, and how.
        batch_size: prompts per forward.
        max_length: tokens of a prompt with its answer; longer prompts lose their start. None: the model's own limit.
        seed: of the choice of examples.
        progress: is told how many of how many forwards' prompts are done.

    Returns:
        One result per task, in the order of ``tasks``.

    Raises:
        ValueError: no tasks, two of one name, fewer examples than ``shots``, a label that is not one token, or a
            tokenizer of another model.
    """
    if shots < 0 or batch_size < 1:
        raise ValueError(f"shots must be at least 0 and batch_size at least 1, got {shots} and {batch_size}")
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be at least one, each with a name of its own, got {names}")
    start = time.perf_counter()
    with quiet_lm_eval():
        lm = QuestionLM(model, tokenizer, batch_size, max_length, progress)
        encoder = QuestionEncoder(tokenizer, lm.max_length)
        encoded = [EncodedTask(task, encoder, shots, seed, (FIRST_TOKEN, TEXT)) for task in tasks]
        _check_vocabulary(model, encoded)
        samples = _run(lm, [config for task in encoded for config in task.configs()])
    seconds = time.perf_counter() - start
    total = sum(len(task.questions) for task in tasks)
    return [
        _task_result(task, samples[task.name(FIRST_TOKEN)], samples[task.name(TEXT)], self_consistency, seconds / total)
        for task in encoded
    ]


def first_token_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: EvaluationTask,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> list[int]:
    """Return the choice of each question whose label has the largest logit: `evaluate_questions`' first-token scoring
    alone, which needs one forward per question where both scorings need one per choice more, and encodes no choices.

    Args:
        model, tokenizer, task, batch_size, max_length, progress: as `evaluate_questions` takes them; no examples.

    Raises:
        ValueError: no questions, a label that is not one token, or a tokenizer of another model.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    with quiet_lm_eval():
        lm = QuestionLM(model, tokenizer, batch_size, max_length, progress)
        encoder = QuestionEncoder(tokenizer, lm.max_length)
        encoded = EncodedTask(task, encoder, shots=0, seed=0, scorings=[FIRST_TOKEN])
        _check_vocabulary(model, [encoded])
        samples = _run(lm, encoded.configs())
    return [int(np.argmax(_logprobs(sample))) for sample in samples[encoded.name(FIRST_TOKEN)]]


def _check_vocabulary(model: Any, encoded: Sequence[EncodedTask]) -> None:
    """Refuse tokens that the model has no embedding of: it would fail amid a batch, on a GPU without saying why."""
    known = model.get_input_embeddings().num_embeddings
    largest = max(task.largest_token for task in encoded)
    if largest >= known:
        raise ValueError(
            f"the tokenizer makes token {largest} and the model knows {known:,}: they do not belong together; pass the "
            "model's own tokenizer"
        )


def _run(lm: QuestionLM, configs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's answers of each task, in the questions' order."""
    found = simple_evaluate(
        model=lm,
        tasks=configs,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,  # standard errors come from the answers
        # None: the caller's random numbers stay as they are; nothing here is drawn by lm-eval.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=None,
    )
    return {name: sorted(own, key=lambda sample: sample["doc_id"]) for name, own in found["samples"].items()}


def _task_result(
    encoded: EncodedTask,
    first_token: list[dict[str, Any]],
    text: list[dict[str, Any]],
    self_consistency: SelfConsistency | None,
    seconds_per_question: float,
) -> TaskResult:
    questions = encoded.task.questions
    records = [
        _record(i, question, label_sample, text_sample, self_consistency)
        for i, (question, label_sample, text_sample) in enumerate(zip(questions, first_token, text, strict=True))
    ]
    right = [record.first_token == record.answer for record in records]
    voted = None if self_consistency is None else accuracy([record.voted == record.answer for record in records])
    return TaskResult(
        task=encoded.task.name,
        questions=len(records),
        first_token_accuracy=accuracy(right),
        stderr=standard_error(right),
        acc=accuracy([sample["acc"] == 1.0 for sample in text]),
        acc_norm=accuracy([sample["acc_norm"] == 1.0 for sample in text]),
        self_consistency_accuracy=voted,
        truncated_prompts=encoded.truncated,
        seconds=seconds_per_question * len(records),
        questions_sha256=questions_digest(questions),
        records=records,
    )


def _record(
    index: int,
    question: Question,
    label_sample: dict[str, Any],
    text_sample: dict[str, Any],
    self_consistency: SelfConsistency | None,
) -> QuestionRecord:
    labels, texts = _logprobs(label_sample), _logprobs(text_sample)
    drawn = None if self_consistency is None else self_consistency.draw(labels, question.prompt)
    lengths = [len(choice) for choice in text_sample["doc"]["choices"]]
    return QuestionRecord(
        index=index,
        context=question.context,
        question=question.question,
        labels=list(question.answers),
        answer=question.answer,
        first_token=int(np.argmax(labels)),
        label_logprobs=labels,
        text=int(np.argmax(texts)),
        text_norm=int(np.argmax(np.array(texts) / lengths)),
        text_logprobs=texts,
        votes=None if drawn is None else [drawn.count(label) for label in range(len(labels))],
        voted=None if drawn is None else majority(drawn),
    )


def _logprobs(sample: dict[str, Any]) -> list[float]:
    return [float(logprob) for logprob, _ in sample["filtered_resps"]]
