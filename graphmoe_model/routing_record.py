"""What a layer leaves behind about its routing, what it must know about the batch to do so, and how to collect it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RoutingRecord(NamedTuple):
    """One forward's routing statistics of one router.

    Attributes:
        counts: [T, n], tokens that chose each expert in each round; where routing is dense, all of them.
        mass: [T, n], differentiable; the routing probability each expert got, summed over tokens (top-k entries for
            the paper's loss, full softmax for the switch form).
        tokens: scalar tensor, how many tokens were counted (padding is not).
    """

    counts: Tensor
    mass: Tensor
    tokens: Tensor

    def detach(self) -> RoutingRecord:
        """The same numbers without the graph behind ``mass``."""
        return RoutingRecord(self.counts, self.mass.detach(), self.tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingRecord:
        """Detached: a model can be copied after a forward, the forward's graph cannot."""
        return RoutingRecord(*(tensor.detach().clone() for tensor in self))


class ExpertLoad:
    """How many tokens each expert got, per router and round, summed over forwards (`collect_routing`).

    A router has its layer's name, and where every linear has a router of its own, that linear's.

    Attributes:
        counts: router name -> [T, n] int64, on the layer's device; layers that have not run are absent. Where routing
            is dense every token counts for every expert.
        weights: router name -> [T, n] fp64, the routing probability that each expert got, summed over tokens (of the
            top k alone, or of the whole softmax with ``router_aux_loss="switch"``).
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.counts: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self._names = names
        self._dense: set[str] = set()  # routers by which every token has all experts

    def load(self) -> dict[str, Tensor]:
        """Router name -> [T, n]: each expert's share of a round; rows sum to 1, or to 0 without tokens.

        Of the choices or, where routing is dense and all are chosen, of the routing probability.
        """
        return {
            name: _shares(self.weights[name] if name in self._dense else counts.double())
            for name, counts in self.counts.items()
        }

    def add(self, layer: Any, router: str, record: RoutingRecord) -> None:
        """Count one forward of a router; ``ValueError`` if it ran with other rounds or experts than before."""
        name = ".".join(part for part in (self._names[layer], router) if part)
        counts, weights = record.counts.detach().to(torch.int64), record.mass.detach().double()
        if layer.active_config().base_method.dense:
            self._dense.add(name)
        if name not in self.counts:
            self.counts[name], self.weights[name] = counts, weights
            return
        if self.counts[name].shape != counts.shape:
            raise ValueError(
                f"{name} ran with [rounds, experts] = {list(self.counts[name].shape)} and now with "
                f"{list(counts.shape)}; collect each adapter in a collect_routing of its own"
            )
        self.counts[name] = self.counts[name] + counts
        self.weights[name] = self.weights[name] + weights


@dataclass
class RoutingContext:
    """Shared by all layers of a model: set by the model around its forward, read by the layers.

    Attributes:
        token_mask: [B, P] or None; 0 where a token is padding.
        loads: the open `collect_routing` blocks; routing is recorded for them although no loss needs it.
        in_loss: the last forward's router loss is part of that forward's ``outputs.loss``.
        unused: the last training forward's router loss is part of no loss so far.
    """

    token_mask: Tensor | None = None
    loads: list[ExpertLoad] = field(default_factory=list)
    in_loss: bool = False
    unused: bool = False

    @property
    def collecting(self) -> bool:
        """Whether routing is wanted although no loss needs it."""
        return bool(self.loads)

    def record(self, layer: Any, records: dict[str, RoutingRecord]) -> None:
        """Leave a forward's records, by router, on the layer, in place of those before.

        Activation checkpointing runs a layer again inside the backward pass. That run is not recorded: it would count
        the tokens twice, and its record would keep alive the activations that checkpointing is there to free.
        """
        if _in_backward():
            return
        layer.routing = records
        for load in self.loads:
            for router, record in records.items():
                load.add(layer, router, record)


def routed_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that leave routing records, by their names in the base model (PEFT's own prefix removed)."""
    named = model.named_modules()
    return {name.rpartition("base_model.model.")[2]: m for name, m in named if hasattr(m, "routing_context")}


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[ExpertLoad]:
    """Count which experts the tokens go to, in every forward inside the block, training or not.

        with collect_routing(model) as routing:
            model.generate(**inputs)
        routing.counts["model.layers.0.mlp"]  # [T, n]; of LoRAMoE and MoLA ["model.layers.0.mlp.gate_proj"] and so on

    Padding is left out where the model gets a 2-D ``attention_mask`` [B, P]; without one, or with a 4-D mask (which
    ``generate`` makes for a static cache), every token counts. Blocks may be nested; each counts for itself. Under data
    parallelism every process counts its own tokens.

    Args:
        model: anything that contains GraphMoE layers: a PEFT model, a wrapped one, or a single layer.

    Raises:
        TypeError: there is no GraphMoE layer in ``model``.
    """
    layers = routed_layers(model)
    if not layers:
        raise TypeError(f"no GraphMoE layer in this {type(model).__name__}, so there is no routing to collect")
    load = ExpertLoad({layer: name for name, layer in layers.items()})
    contexts = list({id(layer.routing_context): layer.routing_context for layer in layers.values()}.values())
    for context in contexts:
        context.loads.append(load)
    try:
        yield load
    finally:
        for context in contexts:
            context.loads.remove(load)


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def _in_backward() -> bool:
    # The check that torch.utils.checkpoint itself uses; a compiled graph keeps its own account of what it recomputes.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
