"""Collectors of routing: at work in every forward inside a block, whether or not a loss reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from graphmoe_model.routing.record import RecordedLayer, RoutingCollector, RoutingRecord, contexts_of, routed_layers


def layers_to_collect(model: nn.Module) -> dict[str, RecordedLayer]:
    """Return the model's GraphMoE layers by name; ``TypeError`` if there is none."""
    layers = routed_layers(model)
    if not layers:
        raise TypeError(f"no GraphMoE layer in this {type(model).__name__}, so there is no routing to collect")
    return layers


@contextmanager
def at_work(collector: RoutingCollector, layers: dict[str, RecordedLayer]) -> Iterator[None]:
    """Hand every router's record to a collector, in every forward of the layers inside the block."""
    contexts = contexts_of(layers.values())
    for context in contexts:
        context.loads.append(collector)
    try:
        yield
    finally:
        for context in contexts:
            context.loads.remove(collector)


def router_name(names: dict[Any, str], layer: Any, record: RoutingRecord) -> str:
    """Return what a router is called: its layer's name, and where every linear has its own, that linear's."""
    return ".".join(part for part in (names[layer], record.router) if part)
