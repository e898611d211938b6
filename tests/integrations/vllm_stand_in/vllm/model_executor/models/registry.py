"""Architectures by name; an external one is named as ``module:class`` and imported when it is wanted."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class _Registry:
    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def get_supported_archs(self) -> Any:
        return self.models.keys()

    def register_model(self, model_arch: str, model_cls: str) -> None:
        if len(model_cls.split(":")) != 2:
            raise ValueError("Expected a string in the format `<module>:<class>`")
        self.models[model_arch] = model_cls

    def resolve_model_cls(self, architectures: list[str]) -> type:
        for name in architectures:
            if name in self.models:
                module, _, cls = self.models[name].partition(":")
                return getattr(import_module(module), cls)
        raise ValueError(f"Model architectures {architectures} are not supported for now.")


ModelRegistry = _Registry()
