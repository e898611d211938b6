"""Whether what is about to be saved is a whole adapter: every tensor is there, in one piece and with data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple

from torch import Tensor, nn

from graphmoe_model.checkpoints.tensor_names import adapter_tensors, by_tree_names, tree_tensors
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.messages import some
from graphmoe_model.module_names import plain_name
from graphmoe_model.storage.weight_management import true_shape

_SAVE = "model.save_pretrained(folder, state_dict=state, is_main_process=rank == 0)"
_FSDP2 = (
    "Gather them first; these calls communicate, so every rank makes them. With Trainer: trainer.save_model(folder), "
    "with fsdp_state_dict_type FULL_STATE_DICT. With Accelerate: state = accelerator.get_state_dict(model). Without: "
    "state = torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
    f"full_state_dict=True, cpu_offload=True)). Then {_SAVE}"
)
_ZERO3 = (
    "Gather them first; these calls communicate, so every rank makes them. With Trainer: trainer.save_model(folder). "
    "With Accelerate: state = accelerator.get_state_dict(engine), which wants stage3_gather_16bit_weights_on_model_"
    f"save in DeepSpeed's configuration, then {_SAVE}. With DeepSpeed alone: with deepspeed.zero.GatheredParameters("
    "[p for p in model.parameters() if p.requires_grad]): model.save_pretrained(folder, is_main_process=rank == 0); "
    "embeddings that are saved with it belong into that list too"
)
_META = (
    "Weights that Accelerate has offloaded are read as they are needed and are not in a state dict: keep what the "
    "adapter trains on a device (device_map)"
)
_EMPTY = (
    "The state dict that was given is empty: gathered ones are, on every rank but the first. Save there alone: "
    "model.save_pretrained(folder, state_dict=state, is_main_process=rank == 0)"
)
_MISSING = (
    "A state dict that is given has to have all tensors of every adapter that is saved, under the model's names; one "
    "of trained tensors alone has no frozen ones. Give model.state_dict(), gathered where it is spread over processes, "
    "or name the adapters that it has: selected_adapters=['default']"
)


class NotWhole(RuntimeError):
    """An adapter was not saved, as some of its tensors were missing, or were there in part."""


class _Problem(NamedTuple):
    """Why tensors are not whole: what they are instead, and what to do."""

    what: str
    todo: str


class _Given(NamedTuple):
    """What `saving_whole` was called with: whether the caller gave the state dict."""

    state: bool


_saving: ContextVar[_Given | None] = ContextVar("the save that is going on", default=None)


@contextmanager
def saving_whole(given_state: bool) -> Iterator[None]:
    """Refuse, inside the block, to take an adapter's tensors out of a state dict that has not all of them whole."""
    token = _saving.set(_Given(given_state))
    try:
        yield
    finally:
        _saving.reset(token)


def whole_adapter_state(get: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Wrap ``get_peft_model_state_dict``: wrapped modules are found by their plain names, and what is saved is whole.

    Outside of a save, parts of tensors are left as they are: who shards a state dict asks for them.
    """

    @wraps(get)
    def get_peft_model_state_dict(
        model: Any, state_dict: dict[str, Tensor] | None = None, adapter_name: str = "default", **kwargs: Any
    ) -> dict[str, Tensor]:
        config = getattr(model, "peft_config", {}).get(adapter_name)
        if not isinstance(config, GraphMoEConfig):
            return get(model, state_dict=state_dict, adapter_name=adapter_name, **kwargs)
        model = getattr(model, "_orig_mod", model)
        state = by_tree_names(model, model.state_dict() if state_dict is None else state_dict)
        saving = _saving.get()
        if saving is not None:
            _check_present(model, adapter_name, state, saving)
        found = get(model, state_dict=state, adapter_name=adapter_name, **kwargs)
        if saving is not None:
            _check_found(model, adapter_name, found)
        return found

    return get_peft_model_state_dict


def whole_transformers_state(get: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Wrap ``get_adapter_state_dict`` of Transformers' models, by which they save adapters without PEFT's classes."""

    @wraps(get)
    def get_adapter_state_dict(
        self: Any, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        with saving_whole(given_state=state_dict is not None):
            return get(self, adapter_name, state_dict)

    return get_adapter_state_dict


def has_nothing_of(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> bool:
    """Tell whether a state dict lacks a frozen adapter altogether, as one of trained tensors alone does."""
    owned = adapter_tensors(model, adapter_name)
    names = {plain_name(name) for name in by_tree_names(model, state)}
    return not any(o.name in names or o.tensor.requires_grad for o in owned)


def _check_present(model: nn.Module, adapter_name: str, state: dict[str, Tensor], saving: _Given) -> None:
    names = {plain_name(name) for name in state}
    owned = adapter_tensors(model, adapter_name)
    absent = [o.name for o in owned if o.name not in names]
    if absent:
        todo = _EMPTY if saving.state and not state else _MISSING
        raise _refusal(adapter_name, absent, len(owned), "not in the state dict", todo)


def _check_found(model: nn.Module, adapter_name: str, found: dict[str, Tensor]) -> None:
    """Refuse what PEFT takes out of the state dict unless it is all of the adapter; embeddings may come with it."""
    owned = {o.key: o for o in adapter_tensors(model, adapter_name)}
    absent = [owned[key].name for key in owned if key not in found]
    if absent:
        raise _refusal(adapter_name, absent, len(owned), "left out", _MISSING)
    tree = tree_tensors(model)
    problems: dict[_Problem, list[str]] = {}
    for key, value in found.items():
        name, parameter = tree[owned[key].name] if key in owned else tree.get(key, (key, None))
        problem = _problem(value, parameter, sharded="_fsdp_wrapped_module" in name)
        if problem is not None:
            problems.setdefault(problem, []).append(key)
    for problem, keys in problems.items():
        raise _refusal(adapter_name, keys, len(found), problem.what, problem.todo)


def _problem(value: Any, parameter: Tensor | None, sharded: bool) -> _Problem | None:
    """Say what keeps a value from being the whole tensor of the model; FSDP1 (``sharded``) does not tell its shape."""
    if not isinstance(value, Tensor):
        return None  # what quantised embeddings keep beside their weight
    if hasattr(value, "device_mesh"):
        return _Problem("spread over processes (DTensor, as FSDP2 makes them)", _FSDP2)
    if value.is_meta:
        return _Problem("without data (meta device)", _META)
    if value.shape == true_shape(parameter) if parameter is not None else value.numel() > 0:
        return None
    if parameter is None or hasattr(parameter, "ds_shape"):
        return _Problem("spread over processes (DeepSpeed ZeRO-3)", _ZERO3)
    if sharded and value.numel() > 0:
        return None
    return _Problem(f"of another shape than in the model ({list(value.shape)})", _MISSING)


def _refusal(adapter_name: str, names: list[str], count: int, what: str, todo: str) -> NotWhole:
    return NotWhole(
        f"the adapter {adapter_name!r} was not saved, and one that was there stays as it was: {len(names)} of {count} "
        f"tensors are {what}: {some(names)}. {todo}"
    )
