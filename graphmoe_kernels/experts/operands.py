"""What goes into the expert SwiGLU round, gathered under short names; shapes as in `graphmoe_kernels.expert_swiglu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class GateUp(NamedTuple):
    """A pair of tensors: one for the gate projection, one for the up projection."""

    gate: Tensor
    up: Tensor


class LowRankUpdate(NamedTuple):
    """What all experts' pre-activations get in addition: ``state gate^T`` and ``state up^T``.

    Attributes:
        state: [N, G]; gate, up: [F, G].
    """

    state: Tensor
    gate: Tensor
    up: Tensor


class Dropout(NamedTuple):
    """LoRA dropout on the input of ``down_A``.

    Attributes:
        rate: the probability, in [0, 1).
        seed: one int64, where the other operands are. It names the mask (`graphmoe_kernels.experts.dropout`), so that
            backward and a recomputation draw the same one.
    """

    rate: float
    seed: Tensor


class ExpertOperands(NamedTuple):
    """What a round of experts reads, packed once; N tokens, F intermediate size, n experts of rank r, k per token.

    Attributes:
        pre_activations: [N, F] each, the frozen projections' output.
        low: [N, 2nr], A x of every expert, expert-major, for the gate projection and then for the up projection.
        B: [n, F, r] each.
        down_A: [n, r, F].
        routing_weights: [N, k].
        expert_ids: [N, k] integers in 0..n-1, distinct within a row.
        low_update: [N, 2nr], what a later round adds to ``low``.
        update: what a later round adds to the pre-activations.
        scales: [n, F] each, the experts' scale vectors m (DoRA's magnitude over norm), in any float dtype.
        biases: [F] each, constants that no scale vector multiplies.
        dropout: on the input of ``down_A``.
        token_order: [N] int32, a permutation of the tokens in which neighbours share experts (`expert_order`). It
            changes the Triton kernels' speed and nothing else.
    """

    pre_activations: GateUp
    low: Tensor
    B: GateUp
    down_A: Tensor
    routing_weights: Tensor
    expert_ids: Tensor
    low_update: Tensor | None = None
    update: LowRankUpdate | None = None
    scales: GateUp | None = None
    biases: GateUp | None = None
    dropout: Dropout | None = None
    token_order: Tensor | None = None

    def floating(self) -> tuple[Tensor | None, ...]:
        """The tensors that get gradients, in the order of the operator's schema; None where there is none."""
        state, fold_gate, fold_up = self.update or (None, None, None)
        return (
            *self.pre_activations,
            self.low,
            *self.B,
            self.down_A,
            self.routing_weights,
            self.low_update,
            state,
            fold_gate,
            fold_up,
            *(self.scales or (None, None)),
        )


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
