"""Which names an adapter can have: the same when it is added and when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from peft import PeftModel
from torch import nn

from graphmoe_model.config import GraphMoEConfig

# Path components that PEFT's wrappers and an adapter's own parameters have in a model.
COMPONENTS = frozenset(
    [
        *("base_model", "model", "base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
        *("lora_dropout", "lora_magnitude_vector", "magnitude", "weight", "bias", "A", "B"),
        *("lora_graphmoe", "router", "experts", "gate_proj", "up_proj", "down_proj"),
        *("gru", "update_gate", "reset_gate", "candidate", "output_proj"),
        *("modules_to_save", "original_module", "token_adapter"),
        *("trainable_tokens_delta", "trainable_tokens_original"),
    ]
)

# What separates the parts of a tensor's name or of a path, or has a meaning in the patterns by which Transformers'
# loader puts the name into tensors' names.
FORBIDDEN = "./\\()[]{}^$*?|\0"


def check_first_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse to attach anew what is attached: PEFT would put the new adapter's configuration in the old one's place.

    Args:
        model: what a new tuner is to be made around: a base model, on which adapters may be, or a ``PeftModel``.
        adapter_name: the first adapter of that tuner.

    Raises:
        ValueError: the model has an adapter of that name, of any method, or is a ``PeftModel`` of this method.
    """
    adapters = getattr(model, "peft_config", None)
    if not isinstance(adapters, dict):
        return
    if adapter_name in adapters:
        raise ValueError(
            f"the model has an adapter {adapter_name!r} already ({type(adapters[adapter_name]).__name__}), which would "
            "be lost; to begin anew call unload() first, to add one beside it call add_adapter with another name"
        )
    if isinstance(model, PeftModel) and any(isinstance(config, GraphMoEConfig) for config in adapters.values()):
        raise ValueError(
            f"the model is a PeftModel already, with {', '.join(adapters)}; to add an adapter call "
            f"model.add_adapter({adapter_name!r}, config), to begin anew call unload() first"
        )


def check_adapter_name(model: nn.Module, adapter_name: object, adapters: Iterable[str]) -> None:
    """Refuse a name that PEFT and PyTorch cannot keep apart from others in a model and in its checkpoints.

    Args:
        model: the base model, adapters included.
        adapter_name: the new adapter's name.
        adapters: the names of the model's adapters, which are part of its parameters' names.

    Raises:
        ValueError: it is no text or empty, has a character in `FORBIDDEN`, is an attribute of PyTorch's containers, or
            is a module's or parameter's name.
    """
    if not isinstance(adapter_name, str) or not adapter_name:
        raise ValueError(f"an adapter's name is a text that is not empty, got {adapter_name!r}")
    forbidden = [character for character in FORBIDDEN if character in adapter_name]
    if forbidden:
        raise ValueError(
            f"the adapter name {adapter_name!r} has {' and '.join(map(repr, forbidden))} in it; the name becomes part "
            "of tensors' names, of patterns that find them, and of a path: choose one without"
        )
    if any(hasattr(container, adapter_name) for container in (nn.ModuleDict(), nn.ParameterDict())):
        raise ValueError(
            f"the adapter name {adapter_name!r} is also an attribute of PyTorch's containers, so none can hold an "
            "adapter of that name: choose another"
        )
    others = set(adapters) - {adapter_name}
    if adapter_name in COMPONENTS | (_components(model) - others):
        raise ValueError(
            f"the adapter name {adapter_name!r} is also the name of a module; PEFT could not tell their "
            "weights apart in a checkpoint: choose another"
        )


def _components(model: nn.Module) -> set[str]:
    """Collect every part of the names of a model's modules, parameters and buffers."""
    named = (model.named_modules(), model.named_parameters(), model.named_buffers())
    return {part for names in named for name, _ in names for part in name.split(".")}
