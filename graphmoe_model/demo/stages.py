"""The demo's stages. Read `run` for how the package is used: a recipe, training, saved adapters, evaluation."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.text import Text

from graphmoe_model.demo.base import BaseTexts, make_base, make_tokenizer
from graphmoe_model.demo.comparison import compare
from graphmoe_model.demo.fine_tuning import (
    BATCH,
    demo_recipe,
    expert_load,
    fine_tune,
    largest_difference,
    load_adapter,
    load_base,
    make_material,
    score,
)
from graphmoe_model.demo.latency import measure_latency
from graphmoe_model.demo.pretraining import pretrain
from graphmoe_model.demo.results import DemoResults
from graphmoe_model.demo.scale import BASE, FOLDERS, MARK, QUESTIONS, TRAINED, Scale
from graphmoe_model.demo.task import held_out_questions, training_questions
from graphmoe_model.evaluation import TaskResult
from graphmoe_model.parameters import parameters_by_component
from graphmoe_model.questions import QuestionSet

BASE_RATE = 3e-3
LOAD_STEPS = 5  # the last logged steps, over which the report's load of experts is a mean
# GraphMoE as the demo trains it: three rounds of 4 experts, 2 per token. Little data would want dropout; there is no
# end of it here.
PRESET = "graphmoe-mixlora"
ADAPTER: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "num_experts": "4",
    "top_k": 2,
    "rounds": 3,
    "gru_hidden_scale": 0.25,
}


def run(scale: Scale, seed: int, folder: Path, console: Console) -> DemoResults:
    """Everything the demo shows; base model, questions and adapter are left in folders of ``folder``."""
    seconds: dict[str, float] = {}
    adapter = folder / TRAINED
    for name in FOLDERS:
        _empty(folder / name)

    def say(line: str) -> None:
        console.print(Text(line), soft_wrap=True)

    console.rule("A base model from nothing")
    with _timed(seconds, "base model"):
        _make_base(folder / BASE, scale.base_steps, seed, say)
    held_out = held_out_questions(seed, scale.questions)
    asked = training_questions(seed, BATCH * max(scale.steps, scale.comparison_steps), held_out)
    material = make_material(folder / QUESTIONS, folder / BASE, asked, held_out)
    base, tokenizer = load_base(folder / BASE)
    before = score(base, tokenizer, held_out)

    console.rule("Fine-tuning GraphMoE adapters, the base frozen")
    recipe = demo_recipe(
        material, adapter, PRESET, steps=scale.steps, seed=seed, logging_steps=max(1, scale.steps // 50), **ADAPTER
    )
    with _timed(seconds, "fine-tuning"):
        trained = fine_tune(recipe, material.questions, say)

    console.rule("Measuring")
    with _timed(seconds, "loading and scoring"):
        reloaded, tokenizer = load_adapter(folder / BASE, adapter)
        after = score(reloaded, tokenizer, held_out)
        difference = largest_difference(score(trained.model, tokenizer, held_out), after)
    with _timed(seconds, "latency"):
        latency = measure_latency(**scale.latency)

    comparison = None
    if scale.comparison_steps:
        console.rule("Every method, equal steps")
        with _timed(seconds, "comparison of methods"):
            comparison = compare(material, held_out, steps=scale.comparison_steps, seed=seed, say=say)

    sizes = ", ".join(f"{name} {value}" for name, value in scale.latency.items() if name != "repeats")
    return DemoResults(
        seed=seed,
        conditions=_conditions(),
        base_parameters=sum(p.numel() for p in base.parameters()),
        parameters={part: count for part, count in parameters_by_component(trained.model).items() if count},
        accuracy_before=_accuracy(before),
        accuracy_after=_accuracy(after),
        questions=sum(map(len, held_out)),
        losses=trained.losses,
        expert_load=expert_load(adapter, LOAD_STEPS),
        latency=latency,
        latency_conditions=f"one layer, {sizes}, 8 experts, top-2, fp32, one thread",
        examples=_examples(held_out, before, after),
        reload_difference=difference,
        seconds=seconds,
        comparison=comparison,
        folder=folder,
    )


def _make_base(folder: Path, steps: int, seed: int, say: Callable[[str], None]) -> None:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    base = make_base(tokenizer)
    pretrain(
        base,
        tokenizer,
        BaseTexts(tokenizer, BATCH * steps, seed),
        title="reading facts and finding words",
        steps=steps,
        batch_size=BATCH,
        learning_rate=BASE_RATE,
        seed=seed,
        say=say,
    )
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _empty(folder: Path) -> None:
    """Make a folder of the demo anew."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def _accuracy(results: Sequence[TaskResult]) -> dict[str, float]:
    return {result.task: result.first_token_accuracy for result in results}


def _examples(
    held_out: Sequence[QuestionSet], before: Sequence[TaskResult], after: Sequence[TaskResult]
) -> list[tuple[str, str, str, str]]:
    """One question of each skill, as `DemoResults` has it."""
    found = []
    for own, first, then in zip(held_out, before, after, strict=True):
        question = own.questions[0]
        chosen = [question.answers[result.records[0].first_token] for result in (first, then)]
        found.append((question.prompt, question.label, chosen[0], chosen[1]))
    return found


def _conditions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "date": date.today().isoformat(),
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
