"""What goes into the expert SwiGLU round, gathered under short names; shapes as in `graphmoe_kernels.expert_swiglu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The operator's tensors. All but ``experts`` are floating point and get gradients."""

    gate: Tensor  # [N, F]
    up: Tensor  # [N, F]
    state: Tensor | None  # [N, G]
    fold_gate: Tensor | None  # [F, G]
    fold_up: Tensor | None  # [F, G]
    low: Tensor  # [N, 2nr]
    low_update: Tensor | None  # [N, 2nr]
    gate_B: Tensor  # [n, F, r]
    up_B: Tensor  # [n, F, r]
    down_A: Tensor  # [n, r, F]
    gate_scale: Tensor | None  # [n, F]
    up_scale: Tensor | None  # [n, F]
    weights: Tensor  # [N, k]
    experts: Tensor  # [N, k]

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        """``change(name, tensor)`` of every tensor that is there."""
        return self._replace(**{name: change(name, x) for name, x in self._asdict().items() if x is not None})

    @property
    def update(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """state, fold_gate and fold_up, which are there together or not at all."""
        if self.state is None or self.fold_gate is None or self.fold_up is None:
            return None
        return self.state, self.fold_gate, self.fold_up

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        """gate_scale and up_scale, which are there together or not at all."""
        if self.gate_scale is None or self.up_scale is None:
            return None
        return self.gate_scale, self.up_scale


class Settings(NamedTuple):
    """The operator's arguments that carry no gradient.

    ``gate_bias`` and ``up_bias`` [F] are there together or not at all. ``order`` and ``tickets`` are for the Triton
    kernels: a permutation of the tokens that puts like experts together, and zeroed counters, one for 16 tokens.
    """

    scale: float
    activation: str
    dropout: float
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    seed: Tensor | None = None
    order: Tensor | None = None
    tickets: Tensor | None = None

    @property
    def biases(self) -> tuple[Tensor, Tensor] | None:
        """gate_bias and up_bias."""
        if self.gate_bias is None or self.up_bias is None:
            return None
        return self.gate_bias, self.up_bias


OPTIONAL = ("state", "fold_gate", "fold_up", "low_update", "gate_scale", "up_scale")
FLOATING = tuple(name for name in Inputs._fields if name != "experts")
