"""What the modules that an adapter selects do not allow: refused before anything in the model has changed."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from graphmoe_model.base_mlp import dense_weight, dense_weights, is_gated_mlp
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.experts import check_rows
from graphmoe_model.linear import RoutedLoRALinear
from graphmoe_model.targets import decoder_layers, walk


def check_selected(model: nn.Module, config: GraphMoEConfig, by_layer: dict[str, int]) -> None:
    """Refuse what the modules that ``target_modules`` select do not allow, before anything in the model has changed.

    ``by_layer`` is `experts_by_name`.

    Raises:
        ValueError: the list or pattern in ``num_experts`` has no number for a module outside of the decoder layers; a
            projection that has experts would get LoRA beside them, or the other way about; DoRA on a weight with a zero
            row.
    """
    for name, module in walk(model):
        if not name or not check_target_module_exists(config, name):
            continue
        _check_shared(name, module, config)
        if by_layer and not any(name.startswith(f"{layer}.") for layer in by_layer):
            raise ValueError(
                f"num_experts={config.num_experts!r} has no number for {name}, which is in no decoder layer; leave it "
                "out of target_modules, or give one number for all"
            )
        if config.use_dora:
            _check_dora(name, module.base_layer if isinstance(module, BaseTunerLayer) else module)


def _check_shared(name: str, module: nn.Module, config: GraphMoEConfig) -> None:
    """A linear is wrapped once: by LoRA or by experts, whichever adapter came first."""
    of_experts, of_lora = isinstance(module, RoutedLoRALinear), isinstance(module, LoraLayer)
    wanted = config.base_method.attention
    if (of_experts and wanted == "lora") or (of_lora and wanted == "experts"):
        has, gets = ("experts", "LoRA") if of_experts else ("LoRA", "experts")
        adapters = ", ".join(module.lora_graphmoe if of_experts else module.lora_A)  # type: ignore[arg-type]
        raise ValueError(
            f"{name} has {has} from the adapter {adapters}, and method={config.method!r} puts {gets} there; one "
            "projection cannot hold both: give the new adapter target_modules=['mlp'], or unload() the model first"
        )


def _check_dora(name: str, module: Any) -> None:
    if is_gated_mlp(module):
        for part, weight in dense_weights(module).items():
            check_rows(weight, f"{name}.{part}", name)
    else:
        check_rows(dense_weight(module), name, name)


def experts_by_name(model: nn.Module, config: GraphMoEConfig) -> dict[str, int]:
    """Decoder layer name -> n, for a ``num_experts`` that differs by layer; empty if it is one number.

    Raises:
        ValueError: the list or pattern does not fit the model's number of decoder layers.
    """
    if isinstance(config.num_experts, int):
        return {}
    layers = decoder_layers(model)
    counts = config.experts_by_layer(len(layers))
    return {layer.name: n for layer, n in zip(layers, counts, strict=True)}
