"""Every method of the paper on the demo's task: the same base, data, steps, seed and learning rate for each."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from graphmoe_model.demo.fine_tuning import (
    BATCH,
    RATE,
    Material,
    demo_recipe,
    expert_load,
    fine_tune,
    load_adapter,
    load_base,
    share_of_right_answers,
)
from graphmoe_model.questions import Question, QuestionSet
from graphmoe_model.training import DivergedError
from graphmoe_tables.methods import METHODS, Method

ROUNDS = 3  # of GraphMoE; its base methods have one
GRU_SCALE = 0.25  # of its GRU, as in the demo's own adapter: the paper's 0.1 of 64 hidden units would be 6
LOG_ENTRIES = 5  # of a training; the experts' load is that of the last
SCORED = 100  # questions per forward when they are scored

# LoRA's rank is the one that comes closest to MixLoRA's parameters here; half the paper's 80 would have three quarters
# more.
LORA_RANK = 23


def _half(name: str, method: Method) -> dict[str, Any]:
    """Experts and rank that are half the paper's, as the demo's own adapter has them."""
    if method.routers is None:
        return {"r": LORA_RANK}
    settings = method.published(name)
    sizes = {"r": settings["r"] // 2, "num_experts": settings["num_experts"] // 2}
    return sizes if method.dense else {**sizes, "top_k": settings["top_k"]}


SIZES: dict[str, dict[str, Any]] = {name: _half(name, method) for name, method in METHODS.items()}


class Adapted(NamedTuple):
    """A method at the demo's sizes.

    Attributes:
        title: its name in the literature.
        preset: the papers' settings that it starts from.
        settings: the fields of a recipe that differ from those.
        experts, rank: n and r of every adapted MLP; n is 1 where there is nothing to choose from.
    """

    title: str
    preset: str
    settings: dict[str, Any]
    experts: int
    rank: int


class MethodResult(NamedTuple):
    """What was measured of one method.

    Attributes:
        title: its name in the literature.
        experts, rank: n and r of every adapted MLP; n is 1 where there is nothing to choose from.
        parameters: trainable ones.
        accuracy: mean of the skills' shares of right answers, 0..1.
        step_ms: median milliseconds of a training step, without the first ones.
        scoring_ms: median milliseconds of a forward that scores `Comparison.scored` questions.
        load: the smallest and the largest share of an expert in the last step, over all routers and rounds; None
            without a router.
    """

    title: str
    experts: int
    rank: int
    parameters: int
    accuracy: float
    step_ms: float
    scoring_ms: float
    load: tuple[float, float] | None


class Comparison(NamedTuple):
    """All methods after the same training.

    Attributes:
        steps, batch_size, learning_rate: of each method's training.
        questions: how many held-out questions there are over all skills.
        scored: how many of them are scored by one forward.
        base_accuracy, base_scoring_ms: of the base model, as `MethodResult` has them.
        methods: in the order of `adapted_methods`, without those that diverged.
        diverged: method -> why its training was stopped.
    """

    steps: int
    batch_size: int
    learning_rate: float
    questions: int
    scored: int
    base_accuracy: float
    base_scoring_ms: float
    methods: list[MethodResult]
    diverged: dict[str, str]


def adapted_methods() -> list[Adapted]:
    """Return the 8 base methods, each of those with experts followed by GraphMoE on it: 14 in all."""
    return [
        _adapted(name, use_dora, rounds)
        for name, method in METHODS.items()
        for use_dora in (False, True)
        for rounds in ((1,) if method.routers is None else (1, ROUNDS))
    ]


def _adapted(name: str, use_dora: bool, rounds: int) -> Adapted:
    sizes, method = SIZES[name], METHODS[name]
    base = method.name(use_dora, rounds=1).lower()
    settings: dict[str, Any] = {**sizes, "lora_alpha": 2 * sizes["r"], "lora_dropout": 0.0}
    if "num_experts" in sizes:
        settings["num_experts"] = str(sizes["num_experts"])
    if rounds > 1:
        settings |= {"rounds": rounds, "gru_hidden_scale": GRU_SCALE}
    preset = base if rounds == 1 else f"graphmoe-{base}"
    return Adapted(method.name(use_dora, rounds), preset, settings, sizes.get("num_experts", 1), sizes["r"])


def compare(
    material: Material, held_out: Sequence[QuestionSet], *, steps: int, seed: int, say: Callable[[str], None]
) -> Comparison:
    """Fine-tune each method in turn on the same base model and questions, and measure it; adapters are not kept.

    Args:
        material: its first ``steps * BATCH`` questions are trained on.
        held_out: the questions to answer afterwards, as many of each skill; they are in no method's training data.
        steps, seed: of each method's training.
        say: takes lines for the user.

    Raises:
        ValueError: fewer than 2 steps (the first one is not timed), or fewer questions than they take.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, of which the first is not timed, got {steps}")
    if len(material.questions) < steps * BATCH:
        raise ValueError(f"{steps} steps take {steps * BATCH} questions, got {len(material.questions)}")
    material = material._replace(questions=material.questions[: steps * BATCH])
    asked = [question for own in held_out for question in own]
    adapted, methods, diverged = adapted_methods(), [], {}
    for number, method in enumerate(adapted, start=1):
        say(f"{number:>2}/{len(adapted)} {method.title}")
        try:
            methods.append(_measured(method, material, asked, steps, seed, say))
        except DivergedError as error:
            diverged[method.title] = str(error)
    base_accuracy, base_scoring_ms = _scoring(*load_base(material.base), asked)
    return Comparison(
        steps=steps,
        batch_size=BATCH,
        learning_rate=RATE,
        questions=len(asked),
        scored=min(SCORED, len(asked)),
        base_accuracy=base_accuracy,
        base_scoring_ms=base_scoring_ms,
        methods=methods,
        diverged=diverged,
    )


def uncertainty(questions: int) -> float:
    """Half the 95% interval of an accuracy on this many questions, where it is widest (at one half)."""
    return 1.96 * math.sqrt(0.25 / questions)


def failed_methods(comparison: Comparison, *, learnt: bool) -> list[str]:
    """Return a sentence for each method that diverged or, if it should have ``learnt``, got worse.

    Two models that guess differ by chance: what lies within `uncertainty` of the base model is not worse.
    """
    found = [f"{title}: {why}" for title, why in comparison.diverged.items()]
    worse = comparison.base_accuracy - uncertainty(comparison.questions)
    for method in comparison.methods:
        if learnt and method.accuracy < worse:
            found.append(
                f"{method.title}: accuracy {method.accuracy:.1%} after training is below the base model's "
                f"{comparison.base_accuracy:.1%}."
            )
    return found


def _measured(
    method: Adapted, material: Material, asked: Sequence[Question], steps: int, seed: int, say: Callable[[str], None]
) -> MethodResult:
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        recipe = demo_recipe(
            material,
            adapter,
            method.preset,
            steps=steps,
            seed=seed,
            logging_steps=max(1, steps // LOG_ENTRIES),
            **method.settings,
        )
        trained = fine_tune(recipe, material.questions, say)
        accuracy, scoring_ms = _scoring(*load_adapter(material.base, adapter), asked)
        shares = [share for load in expert_load(adapter, last=1).values() for share in load.flatten().tolist()]
    return MethodResult(
        title=method.title,
        experts=method.experts,
        rank=method.rank,
        parameters=trained.result.trainable_parameters,
        accuracy=accuracy,
        step_ms=median(trained.step_ms[max(1, steps // 10) :]),
        scoring_ms=scoring_ms,
        load=(min(shares), max(shares)) if shares else None,
    )


def _scoring(model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question]) -> tuple[float, float]:
    """The accuracy, and the median of the forwards' milliseconds."""
    with _forward_times(model) as taken:
        accuracy = share_of_right_answers(model, tokenizer, asked, SCORED)
    return accuracy, median(taken)


@contextmanager
def _forward_times(model: nn.Module) -> Iterator[list[float]]:
    """Yield a list that gets the milliseconds of each of the model's forwards: what lm-eval does around them takes
    several times as long with a model so small."""
    started: list[float] = []
    taken: list[float] = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
        model.register_forward_hook(lambda *_: taken.append(1000 * (time.perf_counter() - started[-1]))),
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()
