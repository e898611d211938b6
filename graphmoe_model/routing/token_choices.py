"""Which experts each token goes to: `collect_choices` keeps them over any forwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphmoe_kernels import topk_softmax_routing
from graphmoe_model.routing.collecting import at_work, layers_to_collect, router_name
from graphmoe_model.routing.record import RoutingRecord


class TokenChoices:
    """The experts of each token, per router and round, over forwards one after the other (`collect_choices`).

    Tokens are in the order of the forwards, in each the rows of the batch one after the other, padding left out.
    Routers are called as in `graphmoe_model.routing.expert_load.ExpertLoad`.

    Attributes:
        num_experts: router name -> n.
    """

    def __init__(self, names: Mapping[Any, str]) -> None:
        self.num_experts: dict[str, int] = {}
        self._names = dict(names)
        self._ids: dict[str, list[Tensor]] = {}  # router name -> of each forward [T, N, k]
        self._probabilities: dict[str, list[Tensor]] = {}

    def ids(self) -> dict[str, Tensor]:
        """Return router name -> [T, N, k] int64 on the CPU, by falling probability; all n where routing is dense."""
        return {name: torch.cat(found, dim=1) for name, found in self._ids.items()}

    def probabilities(self) -> dict[str, Tensor]:
        """Return router name -> [T, N, k] on the CPU: the softmax over all experts, of those in `ids`."""
        return {name: torch.cat(found, dim=1) for name, found in self._probabilities.items()}

    @torch.no_grad()
    def add(self, layer: Any, record: RoutingRecord) -> None:
        """Keep one forward of a router; ``ValueError`` if it ran with other rounds or choices than before."""
        name = router_name(self._names, layer, record)
        routed = [
            topk_softmax_routing(logits.detach(), record.top_k, normalize=False, backend=record.backend)
            for logits in record.logits
        ]
        ids = torch.stack([own.expert_ids.long() for own in routed])  # [T, N, k]
        probabilities = torch.stack([own.routing_weights for own in routed])  # [T, N, k]
        if record.token_mask is not None:
            ids, probabilities = ids[:, record.token_mask], probabilities[:, record.token_mask]
        self.num_experts[name] = record.logits[0].shape[1]
        before = self._ids.setdefault(name, [])
        if before and (before[0].shape[0], before[0].shape[2]) != (ids.shape[0], ids.shape[2]):
            raise ValueError(
                f"{name} ran with other rounds or experts per token than before; collect each adapter in a "
                "collect_choices of its own"
            )
        before.append(ids.cpu())
        self._probabilities.setdefault(name, []).append(probabilities.cpu())


@contextmanager
def collect_choices(model: nn.Module) -> Iterator[TokenChoices]:
    """Keep which experts each token goes to, in every forward inside the block, training or not.

    It takes 12 bytes of the CPU's memory per token, router, round and choice, and is otherwise as
    `graphmoe_model.collect_routing`, which counts and keeps nothing per token.

    Raises:
        TypeError: there is no GraphMoE layer in ``model``.
    """
    layers = layers_to_collect(model)
    choices = TokenChoices({layer: name for name, layer in layers.items()})
    with at_work(choices, layers):
        yield choices
