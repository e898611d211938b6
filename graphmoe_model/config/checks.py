"""What values the fields of a `GraphMoEConfig` may have, whatever the model: one function for each kind of field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from graphmoe_kernels import CANDIDATE_ACTIVATIONS, CANDIDATE_INPUTS, FOLD_MODES, check_backend, shown
from graphmoe_tables.methods import METHODS

ROUTER_AUX_LOSSES = ("paper", "switch")
ROUTER_AUX_LOSS_SCOPES = ("local", "global")

# Each round runs the layer once more and, in training, keeps its activations; the paper's results peak at 3 to 5.
MAX_ROUNDS = 100
# No projection of a model is that wide; a typing error would ask for the machine's memory and more.
MAX_RANK = MAX_EXPERTS = 2**16
MAX_GRU_SCALE = 16


class RankSettings(Protocol):
    """The fields of a `LoraConfig` that give ranks and scales."""

    r: Any
    lora_alpha: Any
    rank_pattern: Any
    alpha_pattern: Any


class Selection(Protocol):
    """The fields of a `LoraConfig` that select modules, layers and tokens."""

    target_modules: Any
    exclude_modules: Any
    layers_to_transform: Any
    layers_pattern: Any
    modules_to_save: Any
    trainable_token_indices: Any
    rank_pattern: Any
    alpha_pattern: Any


class Settings(RankSettings, Protocol):
    """The fields of a `GraphMoEConfig` that its checks read; `check_names` asks for further ones by name."""

    top_k: Any
    rounds: Any
    gru_hidden_scale: Any
    lora_dropout: Any
    router_aux_loss_coef: Any
    backend: Any


def check_count(name: str, value: object, largest: int, why: str) -> None:
    """Raise ``ValueError`` unless a value is an integer from 1 to ``largest``; ``why`` is the limit's reason."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {shown(value)}")
    if value > largest:
        raise ValueError(f"{name} must be at most {largest} ({why}), got {shown(value)}")


def check_real(name: str, value: object, what: str, holds: Callable[[float], bool]) -> None:
    """Raise ``ValueError`` unless a value is a finite number for which ``holds``, which ``what`` puts into words."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if not real or not holds(value):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a number that is {what}, got {shown(value)}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def check_ranks(config: RankSettings) -> None:
    """Raise ``ValueError`` for a rank or alpha out of its range, also in ``rank_pattern`` and ``alpha_pattern``."""
    ranks = {f"rank_pattern[{key!r}]": value for key, value in (config.rank_pattern or {}).items()}
    for name, value in {"r": config.r, **ranks}.items():
        check_count(name, value, MAX_RANK, "no layer is that wide")
    alphas = {f"alpha_pattern[{key!r}]": value for key, value in (config.alpha_pattern or {}).items()}
    for name, value in {"lora_alpha": config.lora_alpha, **alphas}.items():
        check_real(name, value, "positive", lambda v: v > 0)


def check_numbers(config: Settings) -> None:
    """Raise ``ValueError`` for a number out of its range, also in ``rank_pattern`` and ``alpha_pattern``."""
    check_ranks(config)
    check_count("top_k", config.top_k, MAX_EXPERTS, "as num_experts")
    check_count("rounds", config.rounds, MAX_ROUNDS, "every round runs the layer again and keeps its activations")
    scale = config.gru_hidden_scale
    check_real("gru_hidden_scale", scale, f"positive and at most {MAX_GRU_SCALE}", lambda v: 0 < v <= MAX_GRU_SCALE)
    check_real("lora_dropout", config.lora_dropout, "in [0, 1)", lambda v: 0 <= v < 1)
    check_real("router_aux_loss_coef", config.router_aux_loss_coef, "0 or positive", lambda v: v >= 0)


def check_names(config: Settings) -> None:
    """Raise ``ValueError`` for a name that is not one of those known, and for a switch that is no bool."""
    choices: dict[str, Iterable[str]] = {
        "method": METHODS,
        "candidate_input": CANDIDATE_INPUTS,
        "candidate_activation": CANDIDATE_ACTIVATIONS,
        "router_aux_loss": ROUTER_AUX_LOSSES,
        "router_aux_loss_scope": ROUTER_AUX_LOSS_SCOPES,
        "fold": FOLD_MODES,
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"unknown {name} {shown(value)}; expected one of {', '.join(map(repr, known))}")
    for name in ("norm_topk_prob", "use_rslora", "use_dora", "inference_mode"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be True or False, got {shown(getattr(config, name))}")
    for name in ("base_model_name_or_path", "revision"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a name or None, got {shown(value)}")
    check_backend(config.backend)


def check_selection(config: Selection) -> None:
    """Raise ``ValueError`` for a field that selects modules or tokens in a form that PEFT would misread.

    PEFT reads a string in ``modules_to_save`` letter by letter, an empty ``layers_to_transform`` as all layers, and
    compiles a regular expression only when the first module is compared with it.
    """
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            _check_regex(name, value, value)
        elif value is not None:
            _check_strings(name, value, "a regular expression, or a list of module names")
    if config.layers_pattern is not None:
        patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
        for pattern in _check_strings("layers_pattern", patterns, "a name of the model's list of layers, or several"):
            _check_regex("layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
    if config.modules_to_save is not None:
        saved = _check_strings("modules_to_save", config.modules_to_save, "a list of module names, such as ['lm_head']")
        for entry in saved:  # PEFT compares them as regular expressions too
            _check_regex("modules_to_save", entry, rf"(^|.*\.){entry}($|\..*)")
    _check_layers(config.layers_to_transform)
    _check_tokens(config.trainable_token_indices)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, getattr(config, name))


def _check_strings(name: str, value: object, expected: str) -> Iterable[str]:
    names = list(value) if isinstance(value, list | tuple | set | frozenset) else None
    if names is None or not all(isinstance(entry, str) and entry for entry in names):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    return names


def _check_regex(name: str, entry: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name}: {shown(entry)} is no regular expression ({error}); escape characters that are meant as they are"
        ) from error


def _indices(value: object) -> Iterator[object]:
    return iter(value if isinstance(value, list | tuple) else ())


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_layers(value: Any) -> None:
    if value is None or _is_index(value):
        return
    if not isinstance(value, list | tuple) or not value or not all(map(_is_index, _indices(value))):
        raise ValueError(
            "layers_to_transform must be a layer's index from 0 on or a list of them, got "
            f"{shown(value)}; leave it out to adapt all layers"
        )


def _check_tokens(value: Any) -> None:
    if value is None:
        return
    lists = value if isinstance(value, Mapping) else {"the input embeddings": value}
    if not lists or not all(isinstance(key, str) and key for key in lists):
        raise ValueError(
            "trainable_token_indices must be a list of token ids, or a dict from an embedding's name to one, got "
            f"{shown(value)}; leave it out to train no tokens"
        )
    for key, ids in lists.items():
        if not isinstance(ids, list | tuple) or not ids or not all(map(_is_index, _indices(ids))):
            raise ValueError(f"trainable_token_indices of {key} must be a list of ids from 0 on, got {shown(ids)}")
        if len(set(ids)) != len(ids):
            raise ValueError(f"trainable_token_indices of {key} names a token twice: {shown(ids)}")


def _check_pattern(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{name} must be a dict from a module's name or a regular expression to a number, got {shown(value)}; "
            "leave it out for one number everywhere"
        )
    for key in value:
        if not isinstance(key, str) or not key:
            raise ValueError(f"{name}: the key {shown(key)} is no module's name; expected text, such as 'mlp'")
        _check_regex(name, key, rf"(.*\.)?({key})$")
