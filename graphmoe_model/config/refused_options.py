"""The options of PEFT's ``LoraConfig`` that GraphMoE does not implement: why not, and what to do instead."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

from peft import LoraConfig

from graphmoe_kernels import shown


class Refusal(NamedTuple):
    """Why an option is refused, and what does instead; a sentence's two halves."""

    reason: str
    instead: str


_ONE_LINEAR = "it starts from the decomposition of one linear's weight, and an expert has none of its own"
_DEFAULT_START = "leave it out: init_lora_weights=True starts every B at zero"

REFUSED_OPTIONS = {
    "fan_in_fan_out": Refusal(
        "it is for weights stored as [in, out] (GPT-2's Conv1D), whose MLPs have no gate to adapt", "leave it out"
    ),
    "bias": Refusal(
        "trained base biases would be shared by all experts and stay changed when the adapter is disabled",
        "leave it at 'none'; to train a module's own parameters name it in modules_to_save",
    ),
    "lora_bias": Refusal(
        "the experts' B have no bias: the kernels combine experts before the down projection, where it has no place",
        "leave it out",
    ),
    "target_parameters": Refusal(
        "it puts LoRA on bare parameters of sparse expert blocks, which GraphMoE does not adapt",
        "name MLPs and linears in target_modules; for LoRA on the base's own experts use peft.LoraConfig",
    ),
    "layer_replication": Refusal(
        "it repeats layers of the base model, and experts are counted and folded once for each layer",
        "repeat the layers in the base model before you attach; rounds=T repeats an MLP with its experts",
    ),
    "megatron_config": Refusal(
        "Megatron's linears spread their weights over devices", "shard whole decoder layers (FSDP) instead"
    ),
    "megatron_core": Refusal("it belongs to megatron_config", "shard whole decoder layers (FSDP) instead"),
    "runtime_config": Refusal(
        "it offloads DoRA's computation for attention alone, and the experts stay on their device",
        "leave it out and move the model with .to(device)",
    ),
    "loftq_config": Refusal("it replaces the base's weights; " + _ONE_LINEAR, _DEFAULT_START),
    "eva_config": Refusal(
        "its start is computed from one linear's activations, and a router decides what an expert sees", _DEFAULT_START
    ),
    "corda_config": Refusal(_ONE_LINEAR, _DEFAULT_START),
    "lora_ga_config": Refusal(
        "it moves a part of the base's weight into one pair of A and B, of which there are n here", _DEFAULT_START
    ),
    "kasa_config": Refusal(
        "it truncates the base's weights, on which the experts and their folds rest", "leave it out"
    ),
    "velora_config": Refusal(
        "it compresses what LoRA's A keeps for the backward pass; the experts' operator keeps other tensors",
        "leave it out; to save memory use gradient checkpointing",
    ),
    "monteclora_config": Refusal(
        "it samples LoRA's weights in every forward, so that no fold could be kept", "leave it out"
    ),
    "alora_invocation_tokens": Refusal(
        "it switches LoRA on at a token of the prompt, and rounds mix a layer's state over their own inputs",
        "use disable_adapter() for the part before",
    ),
    "use_qalora": Refusal(
        "it pools inputs by the groups of a quantised linear",
        "leave it out; docs/quantised.md lists the quantised bases that GraphMoE runs on",
    ),
    "qalora_group_size": Refusal("it belongs to use_qalora", "leave it out"),
    "use_bdlora": Refusal("its A and B are block-diagonal, and the kernels take whole matrices", "leave it out"),
    "arrow_config": Refusal(
        "it routes tokens between LoRA adapters without training a router",
        "train the router that GraphMoE has: num_experts and top_k",
    ),
}
_NEWER = Refusal("this version of GraphMoE does not know it (PEFT is newer), so it would be ignored", "leave it out")
_INITIALISATIONS = Refusal(
    "named initialisations start from one linear's weight", "set True (B starts at zero) or False (random, for tests)"
)
_ALL_LINEAR = Refusal(
    "MLPs are adapted as a whole, not linear by linear",
    "leave target_modules out to adapt all attention projections and MLPs",
)


def default_of(field: Field[Any]) -> object:
    """Return a dataclass field's default value."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def refused_options(config: LoraConfig, supported: frozenset[str]) -> dict[str, Refusal]:
    """Find the options of ``LoraConfig`` that a config sets although GraphMoE does not implement them.

    Args:
        config: with values of any kind.
        supported: the fields of ``LoraConfig`` that GraphMoE implements; every other one must keep its default.

    Returns:
        ``"name=value"`` -> the refusal.
    """
    found = {
        f"{field.name}={shown(getattr(config, field.name))}": REFUSED_OPTIONS.get(field.name, _NEWER)
        for field in fields(LoraConfig)
        if field.name not in supported and getattr(config, field.name) != default_of(field)
    }
    if not isinstance(config.init_lora_weights, bool):
        found[f"init_lora_weights={shown(config.init_lora_weights)}"] = _INITIALISATIONS
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        found["target_modules='all-linear'"] = _ALL_LINEAR
    return found
