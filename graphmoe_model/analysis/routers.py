"""The routers of a model by name, those of its MLPs apart from those of its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from graphmoe_model.layers.ffn import FusedGraphMoEFFN
from graphmoe_model.messages import some
from graphmoe_model.routing.collecting import layers_to_collect

T = TypeVar("T")


def mlp_routers(model: nn.Module) -> list[str]:
    """Return the names of the routers that run once in every round: those of the MLPs, whose layers have the rounds.

    Raises:
        TypeError: there is no GraphMoE layer.
        ValueError: no MLP has a router.
    """
    layers = layers_to_collect(model)
    found = [
        ".".join(part for part in (name, router) if part)
        for name, layer in layers.items()
        if isinstance(layer, FusedGraphMoEFFN)
        for router in layer.router_shapes()
    ]
    if not found:
        raise ValueError("no MLP of this model has a router, so there is no routing to analyze")
    return found


def of_mlps(found: Mapping[str, T], routers: Sequence[str]) -> dict[str, T]:
    """Return what was found for the routers of `mlp_routers`, in their order."""
    return {name: found[name] for name in routers}


def check_routers(asked: Sequence[str], routers: Sequence[str]) -> None:
    """`ValueError` that lists the routers, for a name that is none of them."""
    for name in asked:
        if name not in routers:
            raise ValueError(f"--router {name}: there is no such router; there are {some(list(routers), 6)}")
