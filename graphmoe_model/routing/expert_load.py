"""Which experts the tokens go to: `collect_routing` counts them over any forwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphmoe_model.routing.collecting import at_work, layers_to_collect, router_name
from graphmoe_model.routing.record import RoutingRecord


class ExpertLoad:
    """How many tokens each expert got, per router and round, summed over forwards (`collect_routing`).

    A router has its layer's name, and where every linear has a router of its own, that linear's.

    Attributes:
        counts: router name -> [T, n] int64, on the layer's device; layers that have not run are absent. Where routing
            is dense every token counts for every expert.
        weights: router name -> [T, n] fp64, the routing probability that each expert got, summed over tokens (of the
            top k alone, or of the whole softmax with ``router_aux_loss="switch"``).
    """

    def __init__(self, names: Mapping[Any, str]) -> None:
        self.counts: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self._names = dict(names)
        self._dense: set[str] = set()  # routers by which every token has all experts

    def load(self) -> dict[str, Tensor]:
        """Compute each expert's share of a round, router name -> [T, n]; rows sum to 1, or to 0 without tokens.

        It is the share of the choices or, where routing is dense and all are chosen, of the routing probability.
        """
        return {
            name: _shares(self.weights[name] if name in self._dense else counts.double())
            for name, counts in self.counts.items()
        }

    @torch.no_grad()
    def add(self, layer: Any, record: RoutingRecord) -> None:
        """Count one forward of a router; ``ValueError`` if it ran with other rounds or experts than before."""
        name = router_name(self._names, layer, record)
        statistics = record.detach().statistics()
        counts, weights = statistics.tokens_per_expert.to(torch.int64), statistics.probability_sums.double()
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


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[ExpertLoad]:
    """Count which experts the tokens go to, in every forward inside the block, training or not.

        with collect_routing(model) as routing:
            model.generate(**inputs)
        routing.counts["model.layers.0.mlp"]  # [T, n]; of LoRAMoE and MoLA ["model.layers.0.mlp.gate_proj"] and so on

    Padding is left out where the model gets a 2-D ``attention_mask`` [B, P]; without one, or with a 4-D mask (which
    ``generate`` makes for a static cache), every token counts. Blocks may be nested; each counts for itself. Under data
    parallelism every process counts its own tokens. Counting changes no gradient, also where activations are
    checkpointed and the block is left before the backward pass.

    Args:
        model: anything that contains GraphMoE layers: a PEFT model, a wrapped one, or a single layer.

    Raises:
        TypeError: there is no GraphMoE layer in ``model``.
    """
    layers = layers_to_collect(model)
    load = ExpertLoad({layer: name for name, layer in layers.items()})
    with at_work(load, layers):
        yield load


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
