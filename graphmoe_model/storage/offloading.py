"""Weights that accelerate has offloaded to the CPU or to disk, and brings to a device for each call of a module.

Its hooks bring a linear's weights when that linear is called. A layer of experts also reads the weights of its
projections, routers and experts without calling them, and more than once in a forward: so all that is offloaded below
the layer is brought once, around its forward. The hooks stay where accelerate has put them; whoever looks for them
there (PEFT, Transformers, accelerate itself) finds them as in any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from graphmoe_model.messages import some

Function = TypeVar("Function", bound=Callable[..., Any])

TRAINED_WHILE_OFFLOADED = (
    "the adapter's own weights are offloaded ({names}): accelerate brings a copy for each forward and throws it away, "
    "with its gradient. Dispatch the base model first (device_map in from_pretrained, dispatch_model, cpu_offload) and "
    "attach the adapter after it: then its weights stay on the device, and train"
)


def is_offloaded(module: nn.Module) -> bool:
    """Tell whether accelerate offloads a tensor of this module or of one inside it."""
    rest: list[nn.Module | None] = [module]  # as `_offloading`, which is slower: every forward asks
    while rest:
        own = rest.pop()
        if own is None:
            continue
        state = own.__dict__
        if "_hf_hook" in state and any(hook.offload for hook in _hooks(own)):
            return True
        children = state["_modules"]
        if children:
            rest.extend(children.values())
    return False


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Have all that accelerate offloaded of a module, and of those inside it, on the device inside the block.

    Modules inside may be called there, any number of times. What is there already stays, also after the block.
    """
    opened: list[tuple[nn.Module, Any]] = []
    try:
        for own in [own for own in _offloading(module) if _is_away(own)]:
            opened.append((own, vars(own)["forward"]))
            own._hf_hook.pre_forward(own)  # type: ignore[operator, union-attr]
            own.forward = own._old_forward  # type: ignore[assignment]  # the hooked one would offload after its call
        yield
    finally:
        for own, hooked in opened:
            own.forward = hooked
            own._hf_hook.post_forward(own, None)  # type: ignore[operator, union-attr]


@contextmanager
def onloaded_for_forward(layer: nn.Module) -> Iterator[None]:
    """Have what is offloaded of a layer on its device inside the block, in which its forward runs.

    Raises:
        RuntimeError: in training, where parameters that get gradients are offloaded.
    """
    if layer.training and torch.is_grad_enabled():
        _check_trainable(layer)
    with onloaded(layer):
        yield


def with_onloaded_weights(forward: Function) -> Function:
    """Run a layer's forward, whose first argument is the layer, with what is offloaded of it on its device.

    Raises:
        RuntimeError: in training, where parameters that get gradients are offloaded.
    """

    @wraps(forward)
    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_offloaded(layer):
            return forward(layer, *args, **kwargs)
        with onloaded_for_forward(layer):
            return forward(layer, *args, **kwargs)

    return cast(Function, run)


def offloaded_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters that accelerate offloads of a module and of those inside it, by name."""
    offloading = set(_offloading(module))
    return {
        f"{name}.{own}" if name else own: parameter
        for name, inside in module.named_modules()
        if inside in offloading
        for own, parameter in inside.named_parameters(recurse=False)
    }


def execution_device(module: nn.Module) -> torch.device | str | int:
    """Find where a module computes: as accelerate's hook on or inside it says, else where its first parameter is."""
    for own in module.modules():
        for hook in _hooks(own):
            if hook.execution_device is not None:
                device: torch.device | str | int = hook.execution_device
                return device
    return next(module.parameters()).device


def _check_trainable(layer: nn.Module) -> None:
    lost = [name for name, parameter in offloaded_parameters(layer).items() if parameter.requires_grad]
    if lost:
        raise RuntimeError(TRAINED_WHILE_OFFLOADED.format(names=some(lost, 3)))


def check_not_offloaded(module: nn.Module, name: str, field: str) -> None:
    """Refuse a module that ``field`` of a config would train and that accelerate offloads.

    Raises:
        ValueError: names the field and the module.
    """
    if is_offloaded(module):
        raise ValueError(
            f"{field}: {name} is offloaded by accelerate, which brings a copy for each forward and throws it away, "
            "with its gradient; keep it on a device (device_map in from_pretrained), or leave it out"
        )


def _offloading(module: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the modules from this one on whose hooks offload."""
    rest: list[nn.Module | None] = [module]
    while rest:
        own = rest.pop()
        if own is None:
            continue
        if "_hf_hook" in own.__dict__ and any(hook.offload for hook in _hooks(own)):
            yield own
        rest.extend(own._modules.values())


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """List the hooks that move a module's tensors and inputs to a device, and back."""
    hook = module.__dict__.get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [own for own in hooks if isinstance(own, AlignDevicesHook)]


def _is_away(module: nn.Module) -> bool:
    below = any(hook.place_submodules for hook in _hooks(module) if hook.offload)
    return any(tensor.is_meta for tensor in (*module.parameters(below), *module.buffers(below)))
