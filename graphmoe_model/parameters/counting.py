"""How many parameters an adapter trains, and in which of its parts: of a model, or of a config before there is one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from graphmoe_model.base_models import adapted_on_meta
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.storage.weight_management import true_shape
from graphmoe_model.tuner import ATTENTION_OUTPUT, QUERY_KEY_VALUE

# "experts" and "routers" are the MLPs'; "magnitudes" are DoRA's everywhere; "other" is what is trained beside the
# method, such as modules_to_save.
COMPONENTS = (
    *("attention LoRA", "attention experts", "attention routers"),
    *("experts", "routers", "magnitudes", "GRU", "other"),
)


class AdapterParameters(NamedTuple):
    """What an adapter trains on a model.

    Attributes:
        components: trainable parameters by component, all of `COMPONENTS`.
        base: parameters of the model without the adapter.
    """

    components: dict[str, int]
    base: int

    @property
    def total(self) -> int:
        """Add up all trainable parameters."""
        return sum(self.components.values())

    @property
    def share(self) -> float:
        """Divide the trainable parameters by the model's own, as the papers give it."""
        return self.total / self.base


def parameters_by_component(model: nn.Module) -> dict[str, int]:
    """Count a model's trainable parameters by component, all of `COMPONENTS`; each is in exactly one."""
    found = dict.fromkeys(COMPONENTS, 0)
    parameters = dict(model.named_parameters())
    for name, component in components_by_name(model).items():
        found[component] += true_shape(parameters[name]).numel()
    return found


def components_by_name(model: nn.Module) -> dict[str, str]:
    """Name the component, of `COMPONENTS`, of each of a model's trainable parameters."""
    mlps = {name for name, module in model.named_modules() if isinstance(module, FusedGraphMoEFFN)}
    return {name: _component(name.split("."), mlps) for name, p in model.named_parameters() if p.requires_grad}


def _component(path: list[str], mlps: set[str]) -> str:
    """Name the component of the parameter at this path, in a model whose adapted MLPs are ``mlps``."""
    if "modules_to_save" in path:  # may hold copies of anything
        return "other"
    if "lora_graphmoe" in path:
        container = path.index("lora_graphmoe")
        in_mlp = ".".join(path[:container]) in mlps
        names = {
            "gru": "GRU",
            "magnitude": "magnitudes",
            "router": "routers" if in_mlp else "attention routers",
        }
        own = path[container + 2 :]  # behind the adapter's name, which could be one of these
        return next((names[part] for part in own if part in names), "experts" if in_mlp else "attention experts")
    if "lora_magnitude_vector" in path:
        return "magnitudes"
    pair = next((i for i, part in enumerate(path) if part in ("lora_A", "lora_B")), 0)
    return "attention LoRA" if pair and path[pair - 1] in QUERY_KEY_VALUE | ATTENTION_OUTPUT else "other"


def adapter_parameters(config: GraphMoEConfig, model_config: Any) -> AdapterParameters:
    """Count what an adapter of this config would train on a model of that (Transformers) configuration.

    Both are built on the meta device: nothing is downloaded, and no memory is taken for weights.

    Raises:
        ValueError: as `graphmoe_model.base_models.adapted_on_meta`.
    """
    adapted = adapted_on_meta(config, model_config)
    return AdapterParameters(parameters_by_component(adapted.model), adapted.base)
