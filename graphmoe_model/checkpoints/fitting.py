"""Whether a checkpoint's tensors fit an adapter: asked before any of them is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from graphmoe_model.checkpoints.tensor_names import places, saved_modules, tree_tensors
from graphmoe_model.module_names import ROOT, plain_name
from graphmoe_model.storage.weight_management import true_shape

_SHOWN = 8  # problems of a checkpoint in a message; one of another model has hundreds
_INSIDE = re.compile(r"\.(original_module|token_adapter\.base_layer|base_layer)(?=\.)")
_DELTA = "trainable_tokens_delta"


def fitting_state(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check a checkpoint against the adapter that it is for, before any of it is loaded.

    PEFT writes more than it reads: with ``save_embedding_layers`` (which it sets by itself after the vocabulary was
    resized) a further copy of every trained embedding, by the name it has in the wrapped model. Such copies are left
    out if they are equal to what they are copies of. The untrained weights that it writes then go to the base model's
    module, wrapped or not.

    Args:
        model: holds the adapter.
        adapter_name: its name.
        state: the checkpoint's tensors by their names in it, or in the model.

    Returns:
        What is to be loaded, by its names in the model.

    Raises:
        ValueError: tensors of other shapes or other kinds of dtype than the model's, missing from the checkpoint,
            without a place in the model, or differing copies; each is named.
    """
    own = {plain_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    if not any(name.startswith(ROOT) for name in own):  # injected, without a PeftModel
        state = {name.removeprefix(ROOT): tensor for name, tensor in state.items()}
    shapes = {name: true_shape(tensor) for name, (_, tensor) in tree_tensors(model).items()}
    unwrapped = {_INSIDE.sub("", name): name for name in own}
    adapter, copies, vocabulary = places(model, adapter_name, own), _copies(model, adapter_name), _vocabulary(model)
    state = {adapter.get(plain_name(name), plain_name(name)): tensor for name, tensor in state.items()}
    found: dict[str, Tensor] = {}
    problems = []
    for name, tensor in state.items():
        original = copies.get(name)
        if original in state:
            if not _same(tensor, state[original]):
                problems.append(f"{name}: a copy of {original}, and differs from it")
            continue
        place = name if name in own else unwrapped.get(_INSIDE.sub("", name), name)
        found[place] = tensor
        if place not in own:
            problems.append(f"{name}: not in the model")
            continue
        expected = own[place][1]
        problem = _difference(tensor, expected, shapes.get(place, expected.shape), place in vocabulary)
        problems += [] if problem is None else [f"{name}: {problem}"]
    problems += [f"{name}: missing from the checkpoint" for name in adapter.values() if name not in found]
    if problems:
        raise misfit(adapter_name, list(dict.fromkeys(problems)))
    return {own[name][0]: tensor for name, tensor in found.items()}


def _difference(tensor: Tensor, expected: Tensor, shape: torch.Size, has_row_per_token: bool) -> str | None:
    """Say in what a checkpoint's tensor does not fit the model's, which is whole in this ``shape``; None if it fits."""
    if tensor.shape != shape:
        difference = f"{list(tensor.shape)} in the checkpoint, {list(shape)} in the model"
        if tensor.shape[1:] != shape[1:] or not has_row_per_token:
            return difference
        return (
            f"{difference}; the adapter was trained with {len(tensor)} tokens: call "
            f"model.resize_token_embeddings({len(tensor)}) on the base model before loading"
        )
    if _kind(tensor) != _kind(expected):
        return f"{tensor.dtype} in the checkpoint, {expected.dtype} in the model"
    return None


def missing_modules(model: nn.Module, adapter_name: str, names: Iterable[str]) -> list[str]:
    """List the tensors of ``modules_to_save`` and ``trainable_token_indices`` that a checkpoint lacks."""
    present = set(names)
    return [
        f"{name}.{key}: missing from the checkpoint"
        for name, module in saved_modules(model).items()
        for key in module.adapter_state_dict_load_map(adapter_name)
        if f"{name}.{key}" not in present
    ]


def misfit(adapter_name: str, problems: list[str]) -> ValueError:
    """Make the error for a checkpoint with these problems."""
    lines = "\n".join(f"- {problem}" for problem in problems[:_SHOWN])
    if len(problems) > _SHOWN:
        lines += f"\n- and {len(problems) - _SHOWN:,} more of {len(problems):,}"
    return ValueError(
        f"the checkpoint does not fit the adapter {adapter_name!r}: was it made for another model or "
        "configuration? (An adapter is loaded whole or not at all, also with ignore_mismatched_sizes.)\n"
        f"{lines}"
    )


def _vocabulary(model: nn.Module) -> set[str]:
    """List the tensors that have a row per token, those of the embeddings and of the head, by their plain names."""
    getters = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    modules = [getter() for getter in getters if getter is not None]
    known = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name for name, (_, p) in tree_tensors(model).items() if id(p) in known}


def _copies(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Map the name of a copy in a checkpoint to the plain name in the model of what it is a copy of."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    names = {id(module): name for name, module in modules.items()}
    copies = {}
    for name, module in modules.items():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for key in module.modules_to_save[adapter_name].state_dict():
                copies[f"{name}.modules_to_save.{key}"] = f"{name}.modules_to_save.{adapter_name}.{key}"
        elif isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter:
            tied = names[id(module.token_adapter.tied_adapter)]
            copies[f"{name}.token_adapter.{_DELTA}"] = f"{tied}.{_DELTA}.{adapter_name}"
    return copies


def _same(tensor: Tensor, other: Tensor) -> bool:
    same = tensor.shape == other.shape and tensor.dtype == other.dtype
    return same and torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()
