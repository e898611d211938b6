"""What the backward kernels write, and the gradients that plain products make of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import GateUp, LowRankUpdate
from graphmoe_kernels.experts.triton.sizes import Sizes

# Operands whose gradients are sums over tokens, by name.
OF_EXPERTS = frozenset({"gate_B", "up_B", "down_A", "gate_scale", "up_scale"})


class TokenGradients(NamedTuple):
    """What a backward to the tokens writes."""

    gate: Tensor  # [N, F]
    up: Tensor  # [N, F]
    low: Tensor  # [N, 2nr]
    routing_weights: Tensor  # [N, k] fp32


class WeightSums(NamedTuple):
    """What a backward to the experts adds up, a sum for each split of the tokens; fp32."""

    gate_B: Tensor  # [splits, n, F, r]
    up_B: Tensor  # [splits, n, F, r]
    down_A: Tensor  # [splits, n, F, r]
    scales: GateUp | None  # [splits, n, F] each

    def total(self) -> dict[str, Tensor]:
        """The gradients by name, summed over the splits."""
        found = {"gate_B": _sum(self.gate_B), "up_B": _sum(self.up_B), "down_A": _sum(self.down_A).mT}
        if self.scales is not None:
            found |= {"gate_scale": _sum(self.scales.gate), "up_scale": _sum(self.scales.up)}
        return found


def _sum(x: Tensor) -> Tensor:
    """The sum over the splits; of one split no copy."""
    return x[0] if len(x) == 1 else x.sum(0)


def empty_token_gradients(gate: Tensor, size: Sizes) -> TokenGradients:
    """Uninitialised gradients, for pre-activations like ``gate``."""
    return TokenGradients(
        gate.new_empty((size.tokens, size.width)),
        gate.new_empty((size.tokens, size.width)),
        gate.new_empty((size.tokens, 2 * size.num_experts * size.rank)),
        gate.new_empty((size.tokens, size.slots), dtype=torch.float32),
    )


def no_weight_sums(gate: Tensor, size: Sizes, splits: int, scales: bool) -> WeightSums:
    """Sums of zero, on the device of ``gate``: each in memory of its own, as outputs must be."""
    vectors = splits, size.num_experts, size.width
    gate_B, up_B, down_A = (gate.new_zeros((*vectors, size.rank), dtype=torch.float32) for _ in range(3))
    of_scales = GateUp(*(gate.new_zeros(vectors, dtype=torch.float32) for _ in range(2))) if scales else None
    return WeightSums(gate_B, up_B, down_A, of_scales)


def update_gradients(d: GateUp, update: LowRankUpdate | None, needed: frozenset[str]) -> dict[str, Tensor]:
    """The gradients of an update from those of the pre-activations, by name."""
    found: dict[str, Tensor] = {}
    if update is None:
        return found
    if "state" in needed:
        found["state"] = torch.addmm(d.gate @ update.gate, d.up, update.up)
    if "fold_gate" in needed:
        found["fold_gate"] = d.gate.T @ update.state
    if "fold_up" in needed:
        found["fold_up"] = d.up.T @ update.state
    return found
