"""Which tensors are an adapter's, and what they are called: in the model, wrapped or not, and in its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from peft.tuners.tuners_utils import BaseTuner, _get_tuner_state_dict_key_prefixes, _is_key_under_prefixes
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from graphmoe_model.module_names import ROOT, plain_name

Value = TypeVar("Value")


class Owned(NamedTuple):
    """A tensor of an adapter.

    Attributes:
        name: in the model, without what wrappers put into it.
        key: in a checkpoint.
        tensor: the parameter or buffer; of another shape than the whole one where it is spread (`true_shape`).
    """

    name: str
    key: str
    tensor: Tensor


def saved_key(name: str, adapter_name: str) -> str:
    """Name a tensor of an adapter as checkpoints do: without the adapter's name and without wrappers' parts.

    The adapter's name stands right behind its container, where every PEFT loader puts it back.
    """
    key, container = plain_name(name), f".lora_graphmoe.{adapter_name}."
    if container in key:
        return key.replace(container, ".lora_graphmoe.")
    removed: str = BaseTuner._remove_adapter_name_from_key(key, adapter_name)
    return removed


def own_tensors(model: nn.Module, adapter_name: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """Select an adapter's own tensors (not those of ``modules_to_save``) from a state dict, wrapped or not."""
    prefixes = {plain_name(prefix) for prefix in _get_tuner_state_dict_key_prefixes(model, adapter_name)}
    return {name: value for name, value in state.items() if _is_key_under_prefixes(plain_name(name), prefixes)}


def tree_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """List a model's parameters and buffers: plain name -> name in the tree of its modules, and tensor."""
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {plain_name(name): (name, tensor) for name, tensor in named}


def adapter_tensors(model: nn.Module, adapter_name: str) -> list[Owned]:
    """List what a checkpoint of an adapter has to hold: its own tensors and those that were trained beside it."""
    tree = {name: tensor for name, (_, tensor) in tree_tensors(model).items()}
    owned = [
        Owned(name, saved_key(name, adapter_name), tensor)
        for name, tensor in own_tensors(model, adapter_name, tree).items()
    ]
    for path, module in saved_modules(model).items():
        for key, name in module.adapter_state_dict_load_map(adapter_name).items():
            full = f"{path}.{name}"
            if full in tree:  # else the module is trained beside another adapter
                owned.append(Owned(full, f"{path}.{key}", tree[full]))
    return owned


def saved_modules(model: nn.Module) -> dict[str, Any]:
    """List the wrappers of ``modules_to_save`` and ``trainable_token_indices`` by their plain names."""
    named = model.named_modules()
    return {plain_name(name): module for name, module in named if isinstance(module, AuxiliaryTrainingWrapper)}


def by_tree_names(model: nn.Module, state: Mapping[str, Value]) -> dict[str, Value]:
    """Give the entries of a state dict the names that the tree of modules has, by which PEFT looks for them.

    Wrappers are in the tree and, depending on their kind and on who gathered the state dict, not in it, or the other
    way round; ``module.`` in front is of DistributedDataParallel.
    """
    tree = tree_tensors(model)
    renamed = {}
    for name, value in state.items():
        plain = plain_name(name)
        while plain not in tree and plain.startswith("module."):
            plain = plain.removeprefix("module.")
        renamed[tree[plain][0] if plain in tree else name] = value
    return renamed


def with_wrapped_modules(model: nn.Module, state: Mapping[str, Value]) -> dict[str, Value]:
    """Name what a checkpoint holds of ``modules_to_save`` by the tree of modules, where PEFT's loader looks it up."""
    wrapped = {
        f"{plain_name(name)}.": f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and plain_name(name) != name
    }
    return {_with_prefix(name, wrapped): value for name, value in state.items()}


def _with_prefix(name: str, prefixes: dict[str, str]) -> str:
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return name if found is None else prefixes[found] + name.removeprefix(found)


def places(model: nn.Module, adapter_name: str, names: Iterable[str]) -> dict[str, str]:
    """Map an adapter's keys in a checkpoint to its names in the model, which are among ``names``."""
    found = {}
    for name in own_tensors(model, adapter_name, dict.fromkeys(names)):
        key = saved_key(name, adapter_name)
        found[key] = name
        if not key.startswith(ROOT):  # injected, without a PeftModel; the checkpoint has the prefix all the same
            found[ROOT + key] = name
    return found
