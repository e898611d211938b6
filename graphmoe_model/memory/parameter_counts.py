"""What there is to hold: how many parameters of a model and its adapter, by where they lie."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from graphmoe_model.layers.ffn import FusedGraphMoEFFN


class ParameterCounts(NamedTuple):
    """Parameters of an adapted model. A layer's are those of the largest.

    Attributes:
        layers: how many decoder layers there are.
        linears: the base's in linears of the decoder layers: what a quantised base holds in 4 bits.
        others: the base's besides: embeddings, norms, biases, the language model's head.
        head: of the head, which is gathered while the loss is computed.
        adapter: all that trains.
        layer_linears, layer_others, layer_adapter: of one decoder layer.
        layer_mlp: of the base MLP that is adapted in one layer, whose weights a fold reads together; 0 if none is.
    """

    layers: int
    linears: int
    others: int
    head: int
    adapter: int
    layer_linears: int
    layer_others: int
    layer_adapter: int
    layer_mlp: int

    @property
    def base(self) -> int:
        """Add up all parameters of the base model."""
        return self.linears + self.others


def count_parameters(model: Any) -> ParameterCounts:
    """Count a causal language model with an adapter; it may be on the meta device."""
    layers = list(model.get_decoder().layers)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    head = model.get_output_embeddings()
    found = [_layer(layer) for layer in layers]
    linears = sum(layer[0] for layer in found)
    largest = [max(values) for values in zip(*found, strict=True)]
    return ParameterCounts(
        layers=len(layers),
        linears=linears,
        others=frozen - linears,
        head=head.weight.numel(),
        adapter=_trained(model),
        layer_linears=largest[0],
        layer_others=largest[1],
        layer_adapter=largest[2],
        layer_mlp=largest[3],
    )


def _layer(layer: nn.Module) -> tuple[int, int, int, int]:
    """Count one layer's parameters: the base's in linears and in others, the adapter's, the adapted base MLP's."""
    linears = {id(m.weight): m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear) and _frozen(m)}
    frozen = sum(p.numel() for p in layer.parameters() if not p.requires_grad)
    mlps = [m.base_layer for m in layer.modules() if isinstance(m, FusedGraphMoEFFN)]
    mlp = max((sum(p.numel() for p in mlp.parameters()) for mlp in mlps), default=0)
    return sum(linears.values()), frozen - sum(linears.values()), _trained(layer), mlp


def _frozen(linear: nn.Linear) -> bool:
    return not linear.weight.requires_grad


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
