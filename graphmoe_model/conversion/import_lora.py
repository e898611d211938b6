"""PEFT's LoRA adapters, which MoE-PEFT writes too, as the method with one expert."""

from __future__ import annotations

import re
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig
from torch import Tensor

from graphmoe_model.config import GraphMoEConfig, rank_and_alpha
from graphmoe_model.config.checks import check_ranks, check_selection
from graphmoe_model.conversion.adapter import Adapter, is_other, pattern_of
from graphmoe_model.conversion.layout import LINEARS
from graphmoe_model.conversion.peer_config import base_model_reasons, task_type, unread
from graphmoe_model.conversion.peer_layers import Layers, check_linears, not_adapted, read_layers, wanted, without_gaps
from graphmoe_model.module_names import ROOT

_NAME = re.compile(
    rf"(?P<stem>{re.escape(ROOT)}.+?)\.(?P<layer>\d+)\.(?P<place>.+)\.(lora_[AB]\.weight|lora_magnitude_vector)"
)
_INITIAL_VALUES = ("gaussian", "orthogonal", "eva")  # these draw A and B and leave the base model as it is
_CHECKED = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "trainable_token_indices"),
)
_FIELDS = {f.name for f in fields(LoraConfig)}
_MADE_HERE = {
    "peft_type",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "runtime_config",
    "peft_version",
}


def from_lora(settings: dict[str, Any], weights: dict[str, Tensor], what: str) -> Adapter:
    """Convert a LoRA or DoRA adapter of a model's attention projections and gated MLPs.

    Raises:
        ValueError: the MLPs are not adapted, their linears have different ranks, modules outside of the decoder layers
            are adapted, an option is not implemented here, or tensors are missing, superfluous or of another shape.
    """
    theirs, notes = _peft_config(settings, what)
    saved = {name: tensor for name, tensor in weights.items() if is_other(theirs, name)}
    weights = {name: tensor for name, tensor in weights.items() if name not in saved}
    found = [match for match in map(_NAME.fullmatch, weights) if match]
    stems = sorted({match["stem"] for match in found})
    if len(stems) != 1:
        raise ValueError(
            f"{what} must adapt the layers of one decoder, with tensors called {ROOT}model.layers.<number>.<...>; it "
            f"has {', '.join(stems) or 'none such'}"
        )
    places = {match["place"] for match in found}
    mlps = sorted({place.rpartition(".")[0] for place in places if place.rpartition(".")[2] in LINEARS})
    if len(mlps) != 1:
        raise ValueError(
            f"{what} must adapt linears ({', '.join(LINEARS)}) of one MLP per layer; it has "
            f"{', '.join(mlps) or 'none: PEFT loads such an adapter as it is'}"
        )
    mlp = mlps[0]
    linears = {place.rpartition(".")[2] for place in places if place.startswith(f"{mlp}.")}
    check_linears(linears, what)
    projections = sorted(place for place in places if not place.startswith(f"{mlp}."))
    if theirs.use_dora and len(linears) < len(LINEARS):
        raise ValueError(
            f"{what}: DoRA on {', '.join(sorted(linears))} without the MLP's other linears cannot be converted: their "
            "magnitudes are the row norms of the base model's weights, which are not at hand"
        )
    numbers, problems = _layers(theirs, {int(match["layer"]) for match in found})
    targets = settings.get("target_modules")
    if isinstance(targets, list) and not theirs.exclude_modules:
        names = {place.rpartition(".")[2] for place in places}
        listed, more = wanted([t.rpartition(".")[2] if isinstance(t, str) else t for t in targets], names)
        notes += more
        problems += [f"{name}: in target_modules, but it has no tensors" for name in sorted(listed - names)]
    layers = Layers(stems[0], stems[0], numbers, mlp, [name for name in LINEARS if name in linears], projections, False)
    config = _config(settings, theirs, layers, what)
    tensors = read_layers(weights, config, layers, what, problems)
    return Adapter(config, tensors | saved, (*notes, *not_adapted(layers.linears, config)))


def _peft_config(settings: dict[str, Any], what: str) -> tuple[LoraConfig, list[str]]:
    """Read the file's settings as PEFT's configuration, with notes."""
    task, notes = task_type(settings)
    own = {name: value for name, value in settings.items() if name in _FIELDS - {"runtime_config"}} | {
        "task_type": task
    }
    reasons = unread(settings, _FIELDS | {"lora_init", "name", "task_name", "routing_strategy"})
    reasons += [f"{name}: missing from adapter_config.json" for name in ("r", "lora_alpha") if own.get(name) is None]
    reasons += base_model_reasons(own)
    if reasons:
        raise ValueError("\n- ".join([f"{what} cannot be converted:", *reasons]))
    initial = own.get("init_lora_weights")
    if isinstance(initial, str) and initial in _INITIAL_VALUES:
        own["init_lora_weights"] = True
    given = SimpleNamespace(**{name: own.get(name) for name in _CHECKED})
    for name in ("rank_pattern", "alpha_pattern"):  # where PEFT takes null for none
        setattr(given, name, {} if own.get(name) is None else own[name])
    try:
        check_selection(given)  # before PEFT reads it
        check_ranks(given)
        return LoraConfig(**own), notes
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be converted: {error}") from error


def _layers(config: LoraConfig, found: set[int]) -> tuple[list[int], list[str]]:
    """List the layers that must be there, and what is wrong with those that are."""
    named = config.layers_to_transform
    if named is None:
        return without_gaps(found)
    required = {named} if isinstance(named, int) else set(named)
    problems = [f"layer {number}: all tensors missing" for number in sorted(required - found)]
    problems += [f"layer {number}: not in layers_to_transform" for number in sorted(found - required)]
    return sorted(found), problems


def _config(settings: dict[str, Any], theirs: LoraConfig, layers: Layers, what: str) -> GraphMoEConfig:
    stem = layers.ours.removeprefix(ROOT)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for number in layers.numbers:
        path = f"{stem}.{number}.{layers.mlp}"
        values = {linear: rank_and_alpha(theirs, f"{path}.{linear}") for linear in layers.linears}
        if len(set(values.values())) != 1:
            text = ", ".join(f"{linear} r={r} alpha={alpha}" for linear, (r, alpha) in values.items())
            raise ValueError(f"{what}: the linears of an MLP must have the same rank and alpha, got {text} in {path}")
        ranks[path], alphas[path] = next(iter(values.values()))
        for place in layers.projections:
            path = f"{stem}.{number}.{place}"
            ranks[path], alphas[path] = rank_and_alpha(theirs, path)
    # Names' ends would also select modules of, say, a vision tower where the adapter spells out what it adapts.
    by_name = isinstance(settings.get("target_modules"), list) and not theirs.exclude_modules
    short = {place.rpartition(".")[2] for place in (layers.mlp, *layers.projections)}
    kept = {name: getattr(theirs, name) for name in _FIELDS - _MADE_HERE if name in settings}
    return GraphMoEConfig(
        **kept,
        method="lora",
        rounds=1,
        target_modules=sorted(short if by_name and layers.ours == f"{ROOT}model.layers" else ranks),
        rank_pattern=pattern_of(ranks, theirs.r),
        alpha_pattern=pattern_of(alphas, theirs.lora_alpha),
    )
