"""The paper's sweeps: which settings, and how they are shown (GraphMoE, Fig. 5a and 5b, Tables 5 and 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from graphmoe_model.analysis.sweep import BASE, Series, Setting, slug
from graphmoe_model.base_models import load_base_config
from graphmoe_model.parameters import adapter_parameters
from graphmoe_model.training.models import adapter_config, base_source
from graphmoe_tables.methods import METHODS, PRESETS
from graphmoe_tables.recipe import TrainingRecipe

UNTOUCHED = Setting(BASE, "the base model", None)


class Plan(NamedTuple):
    """The settings of a sweep, each once, and the lines that they are shown in."""

    settings: tuple[Setting, ...]
    series: tuple[Series, ...]


def sensitivity(recipe: TrainingRecipe, rounds: Sequence[int], scales: Sequence[float]) -> Plan:
    """Plan accuracy and time against T, and against the GRU's scale (Fig. 5a, 5b).

    Args:
        recipe: resolved; its scale is that of the rounds, and its rounds, at least two, are those of the scales.
        rounds: T, each at least 1.
        scales: the GRU's width over the hidden size; none leaves that line out.

    Raises:
        ValueError: a number twice, none at all, or scales for a recipe of one round.
    """
    _check_recipe(recipe)
    _check("--rounds", rounds)
    _check("--scales", scales, may_be_empty=True)
    if scales and recipe.rounds == 1:
        raise ValueError(
            "--scales are those of a GRU, which the recipe's one round has not; give it two rounds or more, or leave "
            "the scales out"
        )
    settings = [_rounds_and_scale(recipe, T, recipe.gru_hidden_scale) for T in rounds]
    lines = [Series("rounds", "rounds T", dict(zip(rounds, [own.name for own in settings], strict=True)))]
    if scales:
        others = [_rounds_and_scale(recipe, recipe.rounds or 0, scale) for scale in scales]
        lines.append(
            Series("GRU", "GRU width over the hidden size", dict(zip(scales, [o.name for o in others], strict=True)))
        )
        settings += others
    return Plan(_each_once([UNTOUCHED, *settings]), tuple(lines))


def parameters(recipe: TrainingRecipe, ranks: Sequence[int]) -> Plan:
    """Plan accuracy against trained parameters (Table 5): the recipe at each rank, and its base method beside it at the
    rank that gives it as many.

    Args:
        recipe: resolved, of two rounds or more.
        ranks: of the recipe's method.

    Raises:
        ValueError: a rank twice, none at all, or a recipe of one round, which is its own base method.
    """
    _check_recipe(recipe)
    _check("--ranks", ranks)
    if recipe.rounds == 1:
        raise ValueError("the recipe has one round, so it is its own base method; give it two rounds or more")
    config = load_base_config(base_source(recipe))

    def share(changes: dict[str, Any]) -> float:
        return adapter_parameters(adapter_config(dataclasses.replace(recipe, **changes)), config).share

    title, alpha = adapter_config(recipe).title, (recipe.lora_alpha or 1) / (recipe.r or 1)
    base_title = METHODS[adapter_config(recipe).method].name(bool(recipe.use_dora), 1)
    settings: list[Setting] = [UNTOUCHED]
    own_line: dict[float, str] = {}
    base_line: dict[float, str] = {}
    for r in ranks:
        changes = {"r": r, "lora_alpha": max(1, round(alpha * r))}
        own = Setting(f"own-r{r}", f"{title}, r {r}", changes)
        own_line[share(changes)] = own.name
        settings.append(own)
        wanted = share(changes)
        one, two = (share({**_one_round(), "r": rank, "lora_alpha": 1}) for rank in (1, 2))
        rank = max(1, round(1 + (wanted - one) / (two - one)))  # parameters are linear in the rank
        beside = {**_one_round(), "r": rank, "lora_alpha": max(1, round(alpha * rank))}
        base = Setting(f"base-method-r{rank}", f"{base_title}, r {rank}", beside)
        base_line[share(beside)] = base.name
        settings.append(base)
    axis = "trained parameters, % of the model's"
    lines = [
        Series(name, axis, {100 * place: own for place, own in line.items()})
        for name, line in ((title, own_line), (base_title, base_line))
    ]
    return Plan(_each_once(settings), tuple(lines))


def activated(recipe: TrainingRecipe, top_k: Sequence[int]) -> Plan:
    """Plan accuracy and time against the experts of each token (Table 6).

    Args:
        recipe: resolved, of a method that chooses experts.
        top_k: experts per token.

    Raises:
        ValueError: a number twice, none at all, or a method in which every token has all experts, or one.
    """
    _check_recipe(recipe)
    _check("--top-k", top_k)
    method = adapter_config(recipe).base_method
    if method.routers is None or method.dense:
        raise ValueError(f"{method.title} chooses no experts, so there is no number of them to change")
    settings = [Setting(f"top{k}", f"top {k}", {"top_k": k}) for k in top_k]
    line = Series(
        "experts per token", "experts per token k", {k: own.name for k, own in zip(top_k, settings, strict=True)}
    )
    return Plan(_each_once([UNTOUCHED, *settings]), (line,))


def _rounds_and_scale(recipe: TrainingRecipe, rounds: int, scale: float | None) -> Setting:
    if rounds == 1:
        return Setting("t1", "T = 1", _one_round())
    scale = scale or 0.1  # of a recipe of one round, whose preset may have none
    title = f"T = {rounds}, GRU {scale:g}"
    return Setting(slug(title), title, {"rounds": rounds, "gru_hidden_scale": scale})


def _one_round() -> dict[str, Any]:
    """What makes a recipe that of its base method: no GRU is left to have a size or a rate."""
    return {"rounds": 1, "gru_hidden_scale": None, "gru_learning_rate": None}


def _each_once(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    return tuple({setting.name: setting for setting in settings}.values())


def _check_recipe(recipe: TrainingRecipe) -> None:
    if recipe.start_from is not None:
        raise ValueError("a sweep trains fresh adapters; leave start_from (--start-from) out of the recipe")
    assert recipe.preset in PRESETS


def _check(option: str, values: Sequence[float], may_be_empty: bool = False) -> None:
    if (not values and not may_be_empty) or len(set(values)) < len(values):
        raise ValueError(f"{option} must be at least one number, each once, got {list(values)}")
