"""What the modules that an adapter selects do not allow: refused before anything in the model has changed."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.base_mlp import dense_weights, down_projection
from graphmoe_model.layers.experts import check_rows
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.layers.linear import RoutedLoRALinear
from graphmoe_model.layers.mlp_layouts import is_gated_mlp
from graphmoe_model.module_names import joined
from graphmoe_model.storage.dequantise import dense_weight
from graphmoe_model.storage.weight_management import gathered_weights
from graphmoe_model.tuner.decoder_layers import decoder_layers, is_mlp, walk
from graphmoe_model.tuner.saved_modules import check_saved_modules


def check_selected(
    model: nn.Module, config: GraphMoEConfig, by_layer: dict[str, int], adapter_names: list[str]
) -> None:
    """Refuse what the modules that a config selects do not allow, before anything in the model has changed.

    Args:
        model: the base model.
        config: with its ``target_modules`` found or checked.
        by_layer: from `experts_by_name`.
        adapter_names: of the adapters that the model then has.

    Raises:
        ValueError: the list or pattern in ``num_experts`` has no number for a module outside of the decoder layers; a
            projection that has experts would get LoRA beside them, or the other way about; the GRU of an MLP would have
            no width; DoRA on a weight with a zero row; a key of ``rank_pattern`` or ``alpha_pattern`` without effect;
            modules or tokens to train that there are not (see `graphmoe_model.tuner.saved_modules`).
    """
    base = dict(walk(model))
    selected = [name for name in base if name and check_target_module_exists(config, name)]
    check_saved_modules(base, selected, adapter_names, config)
    for field in ("rank_pattern", "alpha_pattern"):
        _check_pattern(field, getattr(config, field), selected)
    for name in selected:
        module = base[name]
        _check_shared(name, module, config)
        if by_layer and not any(name.startswith(f"{layer}.") for layer in by_layer):
            raise ValueError(
                f"num_experts={config.num_experts!r} has no number for {name}, which is in no decoder layer; leave it "
                "out of target_modules, or give one number for all"
            )
        if is_mlp(module):
            _check_gru(name, module, config)
        if config.use_dora:
            _check_dora(name, module.base_layer if isinstance(module, BaseTunerLayer) else module)


def _check_shared(name: str, module: nn.Module, config: GraphMoEConfig) -> None:
    """Refuse to wrap a linear twice: by LoRA or by experts, whichever adapter came first."""
    of_experts, of_lora = isinstance(module, RoutedLoRALinear), isinstance(module, LoraLayer)
    wanted = config.base_method.attention
    if (of_experts and wanted == "lora") or (of_lora and wanted == "experts"):
        has, gets = ("experts", "LoRA") if of_experts else ("LoRA", "experts")
        adapters = ", ".join(module.lora_graphmoe if of_experts else module.lora_A)  # type: ignore[arg-type]
        raise ValueError(
            f"{name} has {has} from the adapter {adapters}, and method={config.method!r} puts {gets} there; one "
            "projection cannot hold both: give the new adapter target_modules=['mlp'], or unload() the model first"
        )


def _check_pattern(field: str, values: dict[str, object], selected: list[str]) -> None:
    """Refuse a key that counts for no module, or not for the same ones in the order in which PEFT saves them.

    The first key that matches decides, and adapter_config.json has them sorted.
    """
    for name in selected:
        now, later = get_pattern_key(list(values), name), get_pattern_key(sorted(values), name)
        if now in values and values[now] != values[later]:
            raise ValueError(
                f"{field}: the keys {now!r} and {later!r} both match {name}, and PEFT takes the first, which is "
                f"{now!r} now and {later!r} in adapter_config.json, where keys are sorted; make them match different "
                "modules"
            )
    idle = [key for key in values if not any(get_pattern_key([key], name) == key for name in selected)]
    if idle:
        raise ValueError(
            f"{field}: {', '.join(map(repr, idle))} matches none of the adapted modules, which are "
            f"{joined(selected)}; keys are names, ends of names or regular expressions"
        )


def _check_gru(name: str, module: Any, config: GraphMoEConfig) -> None:
    hidden = module.traits.hidden if isinstance(module, FusedGraphMoEFFN) else int(down_projection(module).out_features)
    try:
        config.gru_width(hidden)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_dora(name: str, module: Any) -> None:
    with gathered_weights(module):
        if is_gated_mlp(module):
            for part, weight in dense_weights(module).items():
                check_rows(weight, f"{name}.{part}", name)
        else:
            check_rows(dense_weight(module), name, name)


def experts_by_name(model: nn.Module, config: GraphMoEConfig) -> dict[str, int]:
    """Map each decoder layer's name to its n, for a ``num_experts`` that differs by layer; empty if it is one number.

    Raises:
        ValueError: the list or pattern does not fit the model's number of decoder layers.
    """
    if isinstance(config.num_experts, int):
        return {}
    layers = decoder_layers(model)
    counts = config.experts_by_layer(len(layers))
    return {layer.name: n for layer, n in zip(layers, counts, strict=True)}
