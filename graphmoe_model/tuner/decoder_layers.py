"""The decoder layers of a model, and what each holds: found from the modules' attributes, without a table of models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.layers.mlp_layouts import is_gated_mlp

# A module with children of the first kind is an attention; it is adapted in all children of both kinds.
QUERY_KEY_VALUE = frozenset(
    [
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    ]
)
ATTENTION_OUTPUT = frozenset({"o_proj", "out_proj", "dense", "Wo"})


class DecoderLayer(NamedTuple):
    """What one decoder layer holds, by full module names.

    Attributes:
        name: its own.
        projections: linears of its attention.
        mlps: its gated MLPs.
        others: further modules with submodules: ungated MLPs, sparse expert blocks, state-space mixers.
    """

    name: str
    projections: list[str]
    mlps: list[str]
    others: list[str]


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate as ``named_modules`` does, without the inside of layers that an adapter wraps already."""
    yield name, module
    if isinstance(module, BaseTunerLayer):
        return
    for child_name, child in module.named_children():
        yield from walk(child, f"{name}.{child_name}" if name else child_name)


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Find the layers of the model's language model (not of its vision or audio tower).

    They are the elements of every ``nn.ModuleList`` in which some element has an attention.
    """
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model  # ModernBERT's ``decoder``, which get_decoder finds, is its output embedding
    prefix = next((name for name, module in walk(model) if module is decoder), "")
    return [
        _decoder_layer(f"{name}.{index}", layer)
        for name, layers in walk(decoder, prefix)
        if isinstance(layers, nn.ModuleList) and any(map(_has_attention, layers))
        for index, layer in enumerate(layers)
    ]


def is_attention(module: nn.Module) -> bool:
    """Tell whether a module is an attention: whether it has a projection of `QUERY_KEY_VALUE`."""
    return any(name in QUERY_KEY_VALUE for name, _ in module.named_children())


def is_mlp(module: nn.Module) -> bool:
    """Tell whether a module is a gated MLP, with experts around it or without."""
    return is_gated_mlp(module) or isinstance(module, FusedGraphMoEFFN)


def _has_attention(layer: nn.Module) -> bool:
    return any(map(is_attention, layer.children()))


def _decoder_layer(name: str, layer: nn.Module) -> DecoderLayer:
    found = DecoderLayer(name, [], [], [])
    for child_name, child in layer.named_children():
        full = f"{name}.{child_name}"
        if is_attention(child):
            names = (n for n, _ in child.named_children() if n in QUERY_KEY_VALUE | ATTENTION_OUTPUT)
            found.projections.extend(f"{full}.{n}" for n in names)
        elif is_mlp(child):
            found.mlps.append(full)
        elif any(child.children()):
            found.others.append(full)
    return found
