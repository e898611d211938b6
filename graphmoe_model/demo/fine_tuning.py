"""The demo's adapters: trained by what `graphmoe train` runs, asked by what `graphmoe eval` runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from graphmoe_model.base_models import ModelSource, load_base_model, load_tokenizer
from graphmoe_model.evaluation import EvaluationTask, TaskResult, evaluate_questions, first_token_answers
from graphmoe_model.evaluation.adapters import attach_adapter, saved_config
from graphmoe_model.questions import Question, QuestionSet
from graphmoe_model.questions.json_lines import write_questions
from graphmoe_model.training import TrainingRecipe, TrainingResult, train
from graphmoe_model.training.callbacks import LOAD_FILE

BATCH = 32
# Found in a handful of trials: with fewer questions per step or a lower rate the loss stays at that of a guess for a
# while that rounding alone makes longer or shorter, and 900 steps end anywhere between 45% and 100%.
RATE = 5e-3


class Material(NamedTuple):
    """What adapters are trained on, in files that `graphmoe train` and `graphmoe eval` take.

    Attributes:
        base: the folder of the base model.
        questions: to train on.
        file: those questions, as JSON lines.
    """

    base: Path
    questions: Sequence[Question]
    file: Path


class FineTuned(NamedTuple):
    """What a training left behind, beside the adapter's folder.

    Attributes:
        result: as `graphmoe train` writes it.
        model: as it was trained, in memory.
        losses: (step, loss) as logged, each the mean since the one before.
        step_ms: milliseconds of every step, without fetching its batch.
    """

    result: TrainingResult
    model: nn.Module
    losses: list[tuple[int, float]]
    step_ms: list[float]


def make_material(folder: Path, base: Path, questions: Sequence[Question], held_out: Iterable[QuestionSet]) -> Material:
    """Write the questions to train on, and each set of held-out ones, into a folder."""
    file = folder / "train.jsonl"
    write_questions(file, questions)
    (folder / "held_out").mkdir()
    for own in held_out:
        write_questions(folder / "held_out" / f"{own.name.replace(' ', '_')}.jsonl", own.questions)
    return Material(base, questions, file)


def demo_recipe(
    material: Material, output: Path, preset: str, *, steps: int, seed: int, logging_steps: int, **adapter: Any
) -> TrainingRecipe:
    """Return the recipe that `graphmoe train` would train one of the demo's adapters by.

    Args:
        material: base model and questions.
        output: the adapter's folder.
        preset: the papers' settings.
        steps, seed, logging_steps: of the run.
        adapter: the fields of a recipe that differ from the preset's.
    """
    return TrainingRecipe(
        model=str(material.base),
        data=(str(material.file),),
        output=str(output),
        preset=preset,
        batch=BATCH,
        accumulation=1,
        max_steps=steps,
        learning_rate=RATE,
        scheduler="cosine",
        warmup=1 / 15,
        seed=seed,
        use_cpu=True,
        save_steps=steps,
        keep_checkpoints=1,
        logging_steps=logging_steps,
        report_to="none",
        **adapter,
    )


def fine_tune(recipe: TrainingRecipe, questions: Sequence[Question], say: Callable[[str], None]) -> FineTuned:
    """Train an adapter by `graphmoe_model.training.train`, and keep what the report shows of it.

    Raises:
        DivergedError: the loss is no number any more.
    """
    watch = _Watch()
    result = train(recipe, questions, say=say, callbacks=[watch])
    return FineTuned(result, watch.model, watch.losses, watch.step_ms)


class _Watch(TrainerCallback):
    """Keeps the losses, the steps' times, and the model as it is at the end."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []
        self.step_ms: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Its batch is there; from here the step is timed."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self.step_ms.append(1000 * (time.perf_counter() - self.started))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the loss."""
        if "loss" in kwargs["logs"]:
            self.losses.append((state.global_step, float(kwargs["logs"]["loss"])))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the model."""
        self.model: nn.Module = kwargs["model"]


def load_base(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model and its tokenizer from its folder."""
    source = ModelSource(str(folder))
    return load_base_model(source), load_tokenizer(source)


def load_adapter(base: Path, adapter: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return a saved adapter on the base model, as `graphmoe eval` puts it there, and the tokenizer."""
    model, tokenizer = load_base(base)
    return attach_adapter(model, str(adapter), saved_config(str(adapter))), tokenizer


def score(model: nn.Module, tokenizer: PreTrainedTokenizerBase, held_out: Iterable[QuestionSet]) -> list[TaskResult]:
    """Score a model as `graphmoe eval` does, each skill as a task."""
    return evaluate_questions(model, tokenizer, [EvaluationTask(own.name, own.questions) for own in held_out])


def share_of_right_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_size: int
) -> float:
    """Return the first-token accuracy alone, 0..1: a fifth of the forwards that `score` needs."""
    task = EvaluationTask("held out", questions)
    chosen = first_token_answers(model, tokenizer, task, batch_size=batch_size)
    return sum(choice == q.answer for choice, q in zip(chosen, questions, strict=True)) / len(questions)


def largest_difference(one: Sequence[TaskResult], other: Sequence[TaskResult]) -> float:
    """Return the largest difference of a label's log-probability between two scorings of the same questions."""
    pairs = zip(_logprobs(one), _logprobs(other), strict=True)
    return max(abs(first - second) for first, second in pairs)


def _logprobs(results: Sequence[TaskResult]) -> list[float]:
    return [value for result in results for record in result.records for value in record.label_logprobs]


def expert_load(adapter: Path, last: int) -> dict[str, Tensor]:
    """Return what `graphmoe train` logged beside an adapter: router -> [T, n], the share that each expert got in each
    round, a mean over the last ``last`` logged steps. Empty where there are no routers."""
    file = adapter / LOAD_FILE
    lines = file.read_text(encoding="utf-8").splitlines()[-last:]
    steps = [json.loads(line)["load"] for line in lines]
    return {
        name: torch.tensor([step[name] for step in steps], dtype=torch.float64).mean(dim=0)
        for name in (steps[-1] if steps else ())
    }
