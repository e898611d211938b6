"""Attaching and loading are whole or not at all: what a refusal finds changed is put back."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from graphmoe_model.routing.router_loss_hooks import find_hooks

_CONTAINERS = (dict, list, set)


class ModelState:
    """A model before an adapter is attached or loaded: which objects are where, and not the values in its tensors.

    Modules, parameters, hooks, ``requires_grad``, modes, the adapters of wrapped layers and configurations are kept.
    Values need not be: neither attaching nor loading a further adapter writes to a tensor that was there before.

    Args:
        model: the model, adapted or not.
        others: objects beside its modules whose attributes are kept too.
    """

    def __init__(self, model: nn.Module, *others: object) -> None:
        hooks = find_hooks(model)
        owners = [*others, *model.modules(), *([] if hooks is None else [hooks])]
        self._owners = [_Attributes(owner) for owner in owners]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back in its place."""
        for owner in self._owners:
            owner.restore()
        for parameter, flag in self._trainable:
            parameter.requires_grad = flag


class _Attributes:
    """An object's attributes, and the contents of those that are containers."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.attributes = dict(vars(owner))
        self.contents = {name: copy.copy(v) for name, v in self.attributes.items() if isinstance(v, _CONTAINERS)}

    def restore(self) -> None:
        """Put the attributes back, the containers with their contents: others hold the same ones."""
        for name, content in self.contents.items():
            container: Any = self.attributes[name]
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
