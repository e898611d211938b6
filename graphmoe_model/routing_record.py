"""What a layer leaves behind about its routing, and what it must know about the batch to do so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class RoutingRecord(NamedTuple):
    """One forward's routing statistics of one layer.

    Attributes:
        counts: [T, n], tokens that chose each expert in each round.
        mass: [T, n], differentiable; the routing probability each expert got, summed over tokens (top-k entries for
            the paper's loss, full softmax for the switch form).
        tokens: scalar tensor, how many tokens were counted (padding is not).
    """

    counts: Tensor
    mass: Tensor
    tokens: Tensor


@dataclass
class RoutingContext:
    """Shared by all layers of a model: set by the model around its forward, read by the layers.

    Attributes:
        token_mask: [B, P] or None; 0 where a token is padding.
        collecting: record routing although no loss needs it (`collect_routing`).
    """

    token_mask: Tensor | None = None
    collecting: bool = False
