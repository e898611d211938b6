"""The paper's sweeps: which settings, and how they are shown (GraphMoE, Fig. 5a and 5b, Tables 5 and 6)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from graphmoe_model.analysis.sweep import BASE, Series, Setting, slug
from graphmoe_model.base_models import load_base_config
from graphmoe_model.config import GraphMoEConfig
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
    rank that gives it as many, all at the recipe's scale s.

    Args:
        recipe: resolved, of two rounds or more.
        ranks: of the recipe's method.

    Raises:
        ValueError: a rank twice, none at all, or one that would need an alpha that is no whole number; or a recipe of
            one round, which is its own base method.
    """
    _check_recipe(recipe)
    _check("--ranks", ranks)
    if recipe.rounds == 1:
        raise ValueError("the recipe has one round, so it is its own base method; give it two rounds or more")
    config = load_base_config(base_source(recipe))

    def share(**changes: Any) -> float:
        return adapter_parameters(adapter_config(dataclasses.replace(recipe, **changes)), config).share

    own_config = adapter_config(recipe)
    title, base_title = own_config.title, METHODS[own_config.method].name(own_config.use_dora, 1)
    one, two = (share(**_one_round(), r=rank) for rank in (1, 2))
    settings: list[Setting] = [UNTOUCHED]
    own_line: dict[float, str] = {}
    base_line: dict[float, str] = {}
    for r in ranks:
        wanted = share(r=r)
        rank = max(1, round(1 + (wanted - one) / (two - one)))  # parameters are linear in the rank
        own_title, other_title = f"{title}, r {r}", f"{base_title}, r {rank}"
        alpha = _alpha(own_config, r, own_title)
        other_alpha = _alpha(own_config, rank, f"{other_title}, beside {own_title}")
        own = Setting(f"own-r{r}", own_title, {"r": r, "lora_alpha": alpha})
        other = Setting(f"base-method-r{rank}", other_title, {**_one_round(), "r": rank, "lora_alpha": other_alpha})
        own_line[wanted] = own.name
        base_line[share(**_one_round(), r=rank)] = other.name
        settings += [own, other]
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
    if scale is None:  # a recipe of one round, whose preset may have none
        scale = adapter_config(dataclasses.replace(recipe, rounds=rounds)).gru_hidden_scale
    title = f"T = {rounds}, GRU {scale:g}"
    return Setting(slug(title), title, {"rounds": rounds, "gru_hidden_scale": scale})


def _one_round() -> dict[str, Any]:
    """What makes a recipe that of its base method: no GRU is left to have a size or a rate."""
    return {"rounds": 1, "gru_hidden_scale": None, "gru_learning_rate": None}


def _alpha(config: GraphMoEConfig, rank: int, title: str) -> int:
    """The alpha that gives a rank the recipe's scale s; ``ValueError`` if that is no whole number, as a recipe's is."""
    # Squared, so that rsLoRA's needs no root: s = alpha / sqrt(r), and alpha / r without it.
    squared = Fraction(config.lora_alpha) ** 2 * Fraction(rank, config.r) ** (1 if config.use_rslora else 2)
    alpha = math.isqrt(int(squared))
    if alpha**2 != squared:
        scale = "alpha / sqrt(r), by use_rslora," if config.use_rslora else "alpha / r"
        without = "leave use_rslora out of the recipe and " if config.use_rslora else ""
        raise ValueError(
            f"{title}: the recipe's scale, {scale} of alpha {config.lora_alpha} and r {config.r}, needs alpha "
            f"{math.sqrt(squared):g} at this rank, and alpha is a whole number. So that a sweep of ranks changes no "
            f"scale, {without}give the recipe an alpha that is a multiple of its r"
        )
    return alpha


def _each_once(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """One setting of each name; ``ValueError`` for two that have one and are not the same."""
    named: dict[str, Setting] = {}
    for own in settings:
        if named.setdefault(own.name, own).changes != own.changes:
            raise ValueError(
                f"two settings are both called {own.title!r}, as names have six digits: {named[own.name].changes} and "
                f"{own.changes}; give numbers that differ in those"
            )
    return tuple(named.values())


def _check_recipe(recipe: TrainingRecipe) -> None:
    if recipe.start_from is not None:
        raise ValueError("a sweep trains fresh adapters; leave start_from (--start-from) out of the recipe")
    assert recipe.preset in PRESETS


def _check(option: str, values: Sequence[float], may_be_empty: bool = False) -> None:
    if (not values and not may_be_empty) or len(set(values)) < len(values):
        raise ValueError(f"{option} must be at least one number, each once, got {list(values)}")
