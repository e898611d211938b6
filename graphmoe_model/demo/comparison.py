"""Every method of the paper on the demo's task: the same base, data, steps, seed and learning rate for each."""

from __future__ import annotations

import copy
import math
import time
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from graphmoe_model import GraphMoEConfig, collect_routing
from graphmoe_model.demo.base import TrainingQuestions
from graphmoe_model.demo.task import Question
from graphmoe_model.demo.train import TrainingRun, accuracy, answer_logits, train
from graphmoe_model.parameters import parameters_by_component
from graphmoe_tables.methods import METHODS, Method

ROUNDS = 3  # of GraphMoE; its base methods have one
SCORINGS = 3  # timed, each of every fourth held-out question: one batch with some of every skill

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


class MethodResult(NamedTuple):
    """What was measured of one method.

    Attributes:
        title: its name in the literature.
        experts, rank: n and r of every adapted MLP; n is 1 where there is nothing to choose from.
        parameters: trainable ones.
        accuracy: mean of the skills' shares of right answers, 0..1.
        loss: mean over all training steps; not finite if any step's was not.
        step_ms: median milliseconds of a training step, without the first ones.
        scoring_ms: median milliseconds of scoring `Comparison.scored` questions.
        load: the smallest and the largest share of an expert, over all routers and rounds; None without a router.
    """

    title: str
    experts: int
    rank: int
    parameters: int
    accuracy: float
    loss: float
    step_ms: float
    scoring_ms: float
    load: tuple[float, float] | None


class Comparison(NamedTuple):
    """All methods after the same training.

    Attributes:
        steps, batch_size, learning_rate: of each method's training.
        questions: how many held-out questions there are over all skills.
        scored: how many of them are scored at once when scoring is timed.
        base_accuracy, base_scoring_ms: of the base model, as `MethodResult` has them.
        methods: in the order of `method_configs`.
    """

    steps: int
    batch_size: int
    learning_rate: float
    questions: int
    scored: int
    base_accuracy: float
    base_scoring_ms: float
    methods: list[MethodResult]


def method_configs() -> list[GraphMoEConfig]:
    """The 8 base methods, each of those with experts followed by GraphMoE on it: 14 in all, at the demo's sizes."""
    return [
        GraphMoEConfig(
            task_type="CAUSAL_LM",
            method=method,
            use_dora=use_dora,
            rounds=rounds,
            lora_alpha=2 * SIZES[method]["r"],
            lora_dropout=0.0,
            gru_hidden_scale=0.25,
            **SIZES[method],
        )
        for method in METHODS
        for use_dora in (False, True)
        for rounds in ((1,) if METHODS[method].routers is None else (1, ROUNDS))
    ]


def compare(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[Question],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Comparison:
    """Fine-tune a copy of ``base`` by each method in turn, and measure it; ``base`` itself is left as it is.

    Args:
        held_out: the questions to answer afterwards; they are in no method's training data.

    Raises:
        ValueError: fewer than 2 steps (the first one is not timed).
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, of which the first is not timed, got {steps}")
    questions = TrainingQuestions(tokenizer, steps * batch_size, seed, held_out)
    data: Any = [questions[i] for i in range(len(questions))]  # tokenised once for all methods
    configs, methods = method_configs(), []
    for number, config in enumerate(configs, start=1):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), config)
        trained = train(
            model,
            tokenizer,
            data,
            title=f"{number:>2}/{len(configs)} {config.title}",
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
        )
        methods.append(_measured(model, config, trained, tokenizer, held_out))
    return Comparison(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        questions=len(held_out),
        scored=len(_scored(held_out)),
        base_accuracy=_accuracy(base, tokenizer, held_out),
        base_scoring_ms=_scoring_ms(base, tokenizer, held_out),
        methods=methods,
    )


def uncertainty(questions: int) -> float:
    """Half the 95% interval of an accuracy on this many questions, where it is widest (at one half)."""
    return 1.96 * math.sqrt(0.25 / questions)


def failures(comparison: Comparison, *, learnt: bool) -> list[str]:
    """A sentence for each method whose loss was not finite or, if it should have ``learnt``, that got worse.

    Two models that guess differ by chance: what lies within `uncertainty` of the base model is not worse.
    """
    found = []
    worse = comparison.base_accuracy - uncertainty(comparison.questions)
    for method in comparison.methods:
        if not math.isfinite(method.loss):
            found.append(f"{method.title}: the training loss was not finite.")
        elif learnt and method.accuracy < worse:
            found.append(
                f"{method.title}: accuracy {method.accuracy:.1%} after training is below the base model's "
                f"{comparison.base_accuracy:.1%}."
            )
    return found


def _measured(
    model: nn.Module,
    config: GraphMoEConfig,
    trained: TrainingRun,
    tokenizer: PreTrainedTokenizerFast,
    held_out: list[Question],
) -> MethodResult:
    with collect_routing(model) as routing:
        reached = _accuracy(model, tokenizer, held_out)
    shares = [share for load in routing.load().values() for share in load.flatten().tolist()]
    return MethodResult(
        title=config.title,
        experts=SIZES[config.method].get("num_experts", 1),
        rank=config.r,
        parameters=sum(parameters_by_component(model).values()),
        accuracy=reached,
        loss=trained.mean_loss,
        step_ms=median(trained.step_ms[max(1, len(trained.step_ms) // 10) :]),
        scoring_ms=_scoring_ms(model, tokenizer, held_out),
        load=(min(shares), max(shares)) if shares else None,
    )


def _accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, held_out: list[Question]) -> float:
    return fmean(accuracy(answer_logits(model, tokenizer, held_out), held_out).values())


def _scoring_ms(model: nn.Module, tokenizer: PreTrainedTokenizerFast, held_out: list[Question]) -> float:
    """The median; routing is not recorded, and each scoring folds anew."""
    taken = []
    for _ in range(SCORINGS):
        start = time.perf_counter()
        answer_logits(model, tokenizer, _scored(held_out))
        taken.append(1000 * (time.perf_counter() - start))
    return median(taken)


def _scored(held_out: list[Question]) -> list[Question]:
    return held_out[::4]
