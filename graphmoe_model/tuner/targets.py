"""Which modules of a model are adapted: attention projections and gated MLPs of the decoder layers.

What a config selects is decided by PEFT's own matching, so that a saved adapter finds the same modules again.
"""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.layers.linear import check_linear
from graphmoe_model.layers.mlp_checks import check_mlp
from graphmoe_model.layers.mlp_layouts import is_gated_mlp
from graphmoe_model.layers.routed_layer import RoutedLayer
from graphmoe_model.messages import as_written
from graphmoe_model.module_names import joined, last_names
from graphmoe_model.storage.weight_management import check_unsharded
from graphmoe_model.tuner.decoder_layers import QUERY_KEY_VALUE, DecoderLayer, decoder_layers, is_mlp, walk


def default_targets(model: nn.Module, config: GraphMoEConfig) -> set[str]:
    """Choose the ``target_modules`` of a config without any: the decoder layers' attention projections and MLPs.

    They are suffixes (``"q_proj"``, ``"mlp"``) where these select just the decoder layers' modules, else full names.

    Raises:
        NoMatchingPeftModuleError: there are no decoder layers, or none of their MLPs is left to adapt.
        TypeError: an MLP that the config selects is sharded already.
        ValueError: a layer that the config selects has no supported MLP (the message names each, with the reason);
            ``layers_to_transform`` names a layer that does not exist.
    """
    layers = decoder_layers(model)
    if not layers:
        raise NoMatchingPeftModuleError(
            f"found no decoder layers in {type(model).__name__}: no nn.ModuleList whose elements have an "
            f"attention with {', '.join(sorted(QUERY_KEY_VALUE))}. Seen: {_seen(model)}. Name the modules in "
            "target_modules."
        )
    modules = dict(walk(model))
    candidates = [name for layer in layers for name in layer.mlps or layer.others if _selects(config, name)]
    for name in candidates:
        check_unsharded(modules[name], name)
    reasons = {name: _reason_against(modules[name]) for name in candidates}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    found = [name for layer in layers for name in layer.mlps if _selects(config, name)]
    if refused:
        raise ValueError(_unsupported(model, refused))
    if not found:
        raise NoMatchingPeftModuleError(_no_mlp(model, layers, config))
    if config.base_method.attention is not None:
        found += [name for layer in layers for name in layer.projections if _selects(config, name)]
    _check_layer_indices(found, config)
    return _condensed(found, list(modules), config)


def check_targets(model: nn.Module, config: GraphMoEConfig) -> None:
    """Refuse ``target_modules`` that could not be adapted, before anything in the model has changed.

    Raises:
        TypeError: a selected module is neither an MLP of a supported kind nor a single layer, or is sharded already.
        NoMatchingPeftModuleError: nothing is selected.
        ValueError: an entry is no module's name; no MLP is among what is selected; a module inside a selected one is
            selected too; ``layers_to_transform`` names a layer that does not exist.
    """
    modules = dict(walk(model))
    _check_entries(modules, config)
    selected = {name: modules[name] for name in modules if name and check_target_module_exists(config, name)}
    for name, module in selected.items():
        inside = next((other for other in selected if name.startswith(other + ".")), None)
        if inside is not None:
            raise ValueError(
                f"target_modules select {name}, which lies inside {inside}, selected too; a GraphMoE layer "
                "adapts an MLP as a whole: leave its linears out"
            )
        if isinstance(module, RoutedLayer) or is_gated_mlp(module):
            check_unsharded(module, name)
        if isinstance(module, BaseTunerLayer):
            continue  # a further adapter
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"target_modules select {name}, which another adapter of this model trains by modules_to_save or "
                "trainable_token_indices; leave it out, or unload() the model first"
            )
        single = not is_gated_mlp(module) and not any(module.children())
        in_mlp = is_gated_mlp(modules[name.rpartition(".")[0]])  # refused below, for all such linears at once
        if single and (config.base_method.attention == "lora" or in_mlp):
            continue
        try:
            _check_linear(module, config) if single else check_mlp(module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    if not any(map(is_mlp, selected.values())):
        kind = ValueError if selected else NoMatchingPeftModuleError
        raise kind(_no_mlp_selected(modules, selected, config))
    _check_layer_indices(list(selected), config)


def _check_entries(modules: dict[str, nn.Module], config: GraphMoEConfig) -> None:
    """Refuse an entry that matches nothing: PEFT passes over it, and a typo would cost those adapters unseen."""
    if isinstance(config.target_modules, str):
        return
    entries = sorted(config.target_modules or ())
    unknown = [e for e in entries if not any(name == e or name.endswith("." + e) for name in modules)]
    if unknown:
        kind = NoMatchingPeftModuleError if len(unknown) == len(entries) else ValueError
        raise kind(f"target_modules: no module is called {', '.join(unknown)}; there are {last_names(modules)}")


def _check_linear(module: nn.Module, config: GraphMoEConfig) -> None:
    """Check a single layer beside the MLPs, for a method that does not put LoRA on it."""
    if config.base_method.attention is None:
        raise ValueError(
            f"method={config.method!r} adapts MLPs alone: leave this module out of target_modules, or choose "
            "method='mola', which has experts on attention projections, or 'mixlora', which has LoRA there"
        )
    check_linear(module)


def _reason_against(mlp: nn.Module) -> str | None:
    if isinstance(mlp, FusedGraphMoEFFN):
        return None
    try:
        check_mlp(mlp)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _selects(config: GraphMoEConfig, name: str) -> bool:
    """Tell whether the config's other fields (exclude_modules, layers_to_transform, ...) let a name pass."""
    return bool(check_target_module_exists(_with_targets(config, {name.rpartition(".")[2]}), name))


def _with_targets(config: GraphMoEConfig, targets: set[str]) -> GraphMoEConfig:
    config = copy.copy(config)
    config.target_modules = targets  # type: ignore[assignment]  # PEFT itself makes it a set
    return config


def _condensed(chosen: list[str], names: list[str], config: GraphMoEConfig) -> set[str]:
    """Put a suffix in place of all ``chosen`` names that end in it, where it selects no module besides."""
    targets: set[str] = set()
    for suffix in sorted({name.rpartition(".")[2] for name in chosen}):
        own = {name for name in chosen if name.rpartition(".")[2] == suffix}
        by_suffix = _with_targets(config, {suffix})
        matched = {name for name in names if name and check_target_module_exists(by_suffix, name)}
        targets |= {suffix} if matched == own else own
    return targets


def _no_mlp(model: nn.Module, layers: list[DecoderLayer], config: GraphMoEConfig) -> str:
    kind = type(model).__name__
    if any(layer.mlps for layer in layers):
        fields = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        given = " and ".join(f"{f}={as_written(getattr(config, f))}" for f in fields if getattr(config, f) is not None)
        return (
            f"no MLP of {kind} is left to adapt after {given}: its decoder layers are {layers[0].name} to "
            f"{layers[-1].name}; for LoRA on the attention alone use peft.LoraConfig"
        )
    return f"the decoder layers of {kind} have no MLP module to adapt. Seen: {_seen(model)}"


def _unsupported(model: nn.Module, refused: dict[str, str]) -> str:
    reasons: dict[str, list[str]] = {}  # the layers' modules are alike: one line per reason, not one per layer
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"- {joined(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(
        [
            f"{type(model).__name__} has decoder layers without an MLP that GraphMoE supports:",
            *lines,
            "Leave such layers out with layers_to_transform or exclude_modules if others are supported.",
        ]
    )


def _seen(model: nn.Module) -> str:
    """List the kinds of layers in the model's module lists, with their submodules."""
    layers = [layer for _, module in walk(model) if isinstance(module, nn.ModuleList) for layer in module]
    kinds = {type(layer).__name__: [name for name, _ in layer.named_children()] for layer in layers}
    return ", ".join(f"{kind}({', '.join(children)})" for kind, children in sorted(kinds.items()))


def _no_mlp_selected(modules: dict[str, nn.Module], selected: dict[str, Any], config: GraphMoEConfig) -> str:
    mlps = [name for name, module in modules.items() if is_mlp(module)]
    text = f"target_modules={as_written(config.target_modules)} selects no gated MLP"
    left_out = _left_out(mlps, config)
    if left_out:
        return f"{text}: {left_out}; for LoRA on the attention alone use peft.LoraConfig"
    if any(name.startswith(f"{mlp}.") for name in selected for mlp in mlps):
        text += ", only linears inside one; a GraphMoE layer adapts an MLP as a whole: name the MLP"
    suffixes = sorted({name.rpartition(".")[2] for name in mlps})
    hint = f"the model's gated MLPs are called {', '.join(suffixes)}" if suffixes else "the model has none"
    if isinstance(config.target_modules, str):
        hint += "; a string is a regular expression of whole names, a list has their ends: ['mlp'] or r'.*\\.mlp'"
    return (
        f"{text} ({hint}). Without target_modules, all that the method adapts is selected; for LoRA on the attention "
        "alone use peft.LoraConfig."
    )


def _left_out(mlps: list[str], config: GraphMoEConfig) -> str:
    """Say which fields leave out MLPs that ``target_modules`` mean; empty if these mean none."""
    fields = ("exclude_modules", "modules_to_save", "layers_to_transform")
    bare = copy.copy(config)
    for field in fields:
        setattr(bare, field, None)
    meant = [name for name in mlps if check_target_module_exists(bare, name)]
    reasons = []
    for field in fields:
        alone = copy.copy(bare)
        setattr(alone, field, getattr(config, field))
        if not all(check_target_module_exists(alone, name) for name in meant):
            reasons.append(f"{field}={as_written(getattr(config, field))}")
    return f"it means {joined(meant)}, left out by {' and '.join(reasons)}" if reasons else ""


def _check_layer_indices(selected: list[str], config: GraphMoEConfig) -> None:
    wanted = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str):
        return
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    missing = sorted(i for i in indices if not any(f".{i}." in f".{name}." for name in selected))
    if missing:
        raise ValueError(
            f"layers_to_transform names layers without any target module: {missing}; selected are {joined(selected)}"
        )
