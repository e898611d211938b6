"""Attaching is whole or not at all: what a refusal finds changed is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

_CONTAINERS = (dict, list, set)


class _State:
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


@contextmanager
def undone_on_error(tuner: BaseTuner, adapter_name: str) -> Iterator[None]:
    """Attach an adapter inside the block: if that fails, the model is as it was before, and PEFT forgets the adapter.

    Submodules, parameters, hooks, ``requires_grad``, the adapters of wrapped layers and the configuration are put back.
    No values are: attaching writes to no parameter that was there before.
    """
    model: nn.Module = tuner.model
    states = [_State(owner) for owner in (tuner, tuner.peft_config[adapter_name], *model.modules())]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for state in states:
            state.restore()
        for parameter, flag in trainable:
            parameter.requires_grad = flag
        tuner.peft_config.pop(adapter_name, None)  # PEFT enters the config first; a refused one must not stay
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            vars(model).pop("_hf_peft_config_loaded", None)  # set by Transformers' add_adapter before it calls PEFT
        raise
