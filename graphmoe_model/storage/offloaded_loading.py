"""Loading an adapter onto a base model that accelerate offloads: the base stays, the adapter goes where it computes.

PEFT would take the hooks off the base, attach, and dispatch all of it anew by a device map that it makes up, for which
it rewrites files on disk under names that MLPs with experts do not have. Transformers would load the adapter's tensors
by the base's device map, in which a part on disk has no device. Both read the map in ``hf_device_map``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from graphmoe_model.config import GraphMoEPeftType
from graphmoe_model.module_names import ROOT
from graphmoe_model.storage.offloading import execution_device, is_offloaded, offloaded_parameters

_HUB = ("subfolder", "revision", "cache_dir", "token", "use_auth_token", "repo_type")

Loader = Callable[..., Any]


def onto_offloaded_base(from_pretrained: Any) -> Any:
    """Wrap ``PeftModel.from_pretrained``: an offloaded base model stays where it is.

    Raises:
        ValueError: a ``device_map`` is given that is not the base model's.
    """
    function = from_pretrained.__func__

    @wraps(function)
    def loaded(cls: type, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> PeftModel:
        config = kwargs.get("config", args[2] if len(args) > 2 else None)
        if not is_offloaded(model) or _peft_type(model_id, config, kwargs) != GraphMoEPeftType.GRAPHMOE:
            return function(cls, model, model_id, *args, **kwargs)
        _check_device_map(model, kwargs.get("device_map"))
        with _device_map_hidden(model):
            return function(cls, model, model_id, *args, **kwargs)

    return classmethod(loaded)


def into_offloaded_model(load: Loader) -> Loader:
    """Wrap ``PeftModel.load_adapter``: an offloaded base model stays where it is.

    Raises:
        ValueError: the adapter is there and is offloaded itself, so that nothing can be loaded into it.
    """

    @wraps(load)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if self.peft_type != GraphMoEPeftType.GRAPHMOE or not is_offloaded(self):
            return load(self, model_id, adapter_name, *args, **kwargs)
        _check_device_map(self, kwargs.get("device_map"))
        _check_adapter_is_here(self, adapter_name)
        with _device_map_hidden(self):
            return load(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def into_offloaded_transformers_model(load: Loader) -> Loader:
    """Wrap ``load_adapter`` of Transformers' models, which ``from_pretrained`` of an adapter's folder calls."""

    @wraps(load)
    def load_adapter(
        self: Any, peft_model_id: Any = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        config = kwargs.get("peft_config", args[0] if args else None)
        model_id = peft_model_id or getattr(kwargs.get("load_config"), "pretrained_model_name_or_path", None)
        hub = kwargs.get("adapter_kwargs") or {}
        if not is_offloaded(self) or _peft_type(model_id, config, hub) != GraphMoEPeftType.GRAPHMOE:
            return load(self, peft_model_id, adapter_name, *args, **kwargs)
        _check_adapter_is_here(self, "default" if adapter_name is None else adapter_name)
        with _mapped_to_where_it_runs(self):
            return load(self, peft_model_id, adapter_name, *args, **kwargs)

    return load_adapter


@contextmanager
def _device_map_hidden(model: Any) -> Iterator[None]:
    """Have PEFT see no map, by which it would dispatch the model anew."""
    owners = [own for own in {model, _base(model)} if "hf_device_map" in vars(own)]
    maps = [vars(own).pop("hf_device_map") for own in owners]
    try:
        yield
    finally:
        for own, device_map in zip(owners, maps, strict=True):
            own.hf_device_map = device_map


@contextmanager
def _mapped_to_where_it_runs(model: Any) -> Iterator[None]:
    """Have Transformers see the devices that compute, for what is offloaded as for what is not."""
    modules, before = dict(model.named_modules()), vars(model).get("hf_device_map")
    parts = {"": None} if before is None else before
    model.hf_device_map = {name: str(torch.device(execution_device(modules.get(name, model)))) for name in parts}
    try:
        yield
    finally:
        del model.hf_device_map
        if before is not None:
            model.hf_device_map = before


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_device_map(model: Any, given: Any) -> None:
    """Refuse another map than the base's; a name ("auto") says nothing else than what it was loaded with."""
    present = getattr(model, "hf_device_map", None)
    if not isinstance(given, dict) or present is None:
        return
    here, there = ({n.removeprefix(ROOT): str(d) for n, d in own.items()} for own in (present, given))
    if here != there:
        raise ValueError(
            f"device_map={given!r} is not the one that the base model was loaded with, {dict(present)!r}: the base "
            "stays where it is, and the adapter goes to the devices that compute; load the base model with the "
            "device_map that you want, and leave it out here"
        )


def _check_adapter_is_here(model: nn.Module, adapter_name: str) -> None:
    lost = [name for name in offloaded_parameters(model) if f".{adapter_name}." in name and "lora_" in name]
    if lost:
        raise ValueError(
            f"the adapter {adapter_name!r} is offloaded itself ({lost[0]}, ...), so nothing can be loaded into it: "
            "dispatch the base model first (device_map in from_pretrained) and load the adapter after it"
        )


def _peft_type(model_id: Any, config: Any, hub: dict[str, Any]) -> Any:
    """Return the method of the adapter that is loaded; None if it cannot be told, of which the loader says more."""
    if isinstance(config, PeftConfig):
        return config.peft_type
    if isinstance(config, dict):
        return config.get("peft_type")
    try:
        return PeftConfig._get_peft_type(str(model_id), **{k: v for k, v in hub.items() if k in _HUB and v is not None})
    except (ValueError, KeyError):
        return None
