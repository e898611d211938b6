"""From the keys of a YAML file to a `GraphMoEConfig`: which are taken, which are refused, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from peft import LoraConfig

from graphmoe_model import GraphMoEConfig

ADAPTER = "graphmoe"

# Axolotl's keys of LoRA -> GraphMoEConfig's fields. Those that the method does not have are passed on all the same:
# the configuration refuses them, each with its reason.
LORA_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_layer_replication": "layer_replication",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_ensure_weight_tying": "ensure_weight_tying",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
}

# GraphMoE's own options, which stand in the block `graphmoe:` -> the types they are declared with.
OPTIONS = {
    field.name: str(field.type)
    for field in fields(GraphMoEConfig)
    if field.name not in {own.name for own in fields(LoraConfig)} | {"saved_digest"}
}

# GraphMoEConfig's fields -> their keys in the file, where they are others.
KEYS = {field: key for key, field in LORA_KEYS.items() if field != key}
KEYS |= {name: f"{ADAPTER}.{name}" for name in OPTIONS}

_QUANTISED = ("Axolotl quantises the base for its own lora and qlora alone, and would leave this one as it is", "")
_KERNEL = ("Axolotl's kernels compute plain LoRA in place of the layers' own forward, without experts", "")
REFUSED = {
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "bnb_config_kwargs": _QUANTISED,
    "qlora_sharded_model_loading": _QUANTISED,
    "gptq": ("GPTQ's layers keep no weights that experts could be computed with", ""),
    "peft": ("its loftq_config replaces the base's weights, on which the experts rest", ""),
    "lora_target_linear": (
        "MLPs are adapted as a whole, not linear by linear",
        "; without lora_target_modules all attention projections and all MLPs are adapted",
    ),
    "lora_mlp_kernel": _KERNEL,
    "lora_qkv_kernel": _KERNEL,
    "lora_o_kernel": _KERNEL,
    "lora_embedding_kernel": _KERNEL,
    "lora_on_cpu": ("Axolotl loads adapters on the CPU to merge them, and experts are not merged", ""),
    "merge_lora": ("a router and rounds are no part of the base's weights", "; load base and adapter by PEFT instead"),
}


def adapter_config(cfg: Mapping[str, Any], task_type: str = "CAUSAL_LM") -> GraphMoEConfig:
    """Make the adapter's configuration from Axolotl's, already parsed.

    Args:
        cfg: Axolotl's keys, of which the LoRA keys and the block ``graphmoe`` are read.
        task_type: PEFT's name of what the model is for.

    Raises:
        ValueError: a key that does not fit this method, an option that does not exist, or a value out of range.
    """
    for key, (reason, instead) in REFUSED.items():
        if cfg.get(key):
            raise ValueError(
                f"{key}={cfg[key]!r} does not work with adapter: {ADAPTER}: {reason}; leave it out{instead}"
            )
    settings = given_settings(cfg)
    with yaml_names():
        return GraphMoEConfig(task_type=task_type, **settings)


def given_settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `GraphMoEConfig` that a configuration of Axolotl's gives, as it gives them.

    Raises:
        ValueError: an option in the block ``graphmoe`` that does not exist or has another place.
    """
    given = {field: _plain(cfg[key]) for key, field in LORA_KEYS.items() if cfg.get(key) is not None}
    for name, value in (cfg.get(ADAPTER) or {}).items():
        check_option(name)
        if value is None:  # a key without a value is the default
            continue
        if isinstance(value, str) and OPTIONS[name] == "float":
            with suppress(ValueError):  # YAML reads 1e-2 as text; what is no number, the configuration refuses
                value = float(value)
        given[name] = _plain(value)
    return given


def check_option(name: str) -> None:
    """Check that the block ``graphmoe`` may have this option.

    Raises:
        ValueError: it does not exist, or belongs outside of the block.
    """
    if name in OPTIONS:
        return
    by_field = {field: key for key, field in LORA_KEYS.items()}
    if name in by_field or name in LORA_KEYS:
        raise ValueError(f"{ADAPTER}.{name} has another place: write {by_field.get(name, name)} beside the block")
    near = get_close_matches(str(name), OPTIONS, 1)
    raise ValueError(
        f"{ADAPTER}.{name} does not exist" + (f"; did you mean {near[0]}?" if near else ";") + " The block takes "
        f"{', '.join(OPTIONS)}"
    )


@contextmanager
def yaml_names() -> Iterator[None]:
    """Say in a ``ValueError`` about the configuration's fields which keys of the file it means."""
    try:
        yield
    except ValueError as error:
        named = [f"{field} is {key}" for field, key in KEYS.items() if re.search(rf"^{field}\b|\b{field}=", str(error))]
        raise ValueError(f"{error}" + (f" (in the YAML file {', '.join(named)})" if named else "")) from error


def _plain(value: Any) -> Any:
    """Copy what Axolotl's dictionaries hold into plain ones, which can be saved and compared."""
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, list | tuple) else value
