"""The ranges of a model's modules: attention and plain MLPs by hooks, that are there while a profile runs only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from graphmoe_kernels import named_range
from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.layers.mlp_layouts import is_gated_mlp
from graphmoe_model.tuner import QUERY_KEY_VALUE, decoder_layers, is_attention


def categories(model: nn.Module) -> dict[nn.Module, str]:
    """Find the category of every module that has one.

    A GraphMoE layer's own ranges (`graphmoe_kernels.ranges`) split it further; what lies between them is its experts'.

    Raises:
        ValueError: the model has no decoder layers with an attention, or layers without a gated MLP, whose time would
            pass for the rest of the model's.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"found no decoder layers in {type(model).__name__}: no nn.ModuleList whose elements have an attention "
            f"with {', '.join(sorted(QUERY_KEY_VALUE))}"
        )
    without = [index for index, layer in enumerate(layers) if not layer.mlps]
    if without:
        seen = ", ".join(layers[without[0]].others) or "no other module"
        raise ValueError(
            f"{type(model).__name__} has decoder layers without a gated MLP (layer {without[0]}: {seen}); a profile "
            "knows dense gated MLPs and GraphMoE layers, not ungated MLPs and sparse experts"
        )
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if is_attention(module):
            found[module] = "attention"
        elif isinstance(module, FusedGraphMoEFFN) and not module.disable_adapters:
            found[module] = "experts"
        elif is_gated_mlp(module):
            found[module] = "mlp"
    return found


@contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """Put a named range around every call of the modules in `categories`; see it for the errors."""
    found = categories(model)
    opened: list[AbstractContextManager[Any]] = []

    def enter(module: nn.Module, _: Any) -> None:
        opened.append(named_range(found[module]))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for module in found:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
