"""What goes into a round of experts: packed once, where a round begins, and passed on as it is down to the kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphmoe_kernels.structures import cast


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
            backward and a recomputation draw the same one. PyTorch on a CPU draws another than Triton.
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

    def cast(self) -> ExpertOperands:
        """The same with all in the dtype of the pre-activations that is computed in it.

        Routing weights and scale vectors, whose distance from 1 matters, keep theirs.
        """
        dtype = self.pre_activations.gate.dtype
        return self._replace(
            pre_activations=cast(self.pre_activations, dtype),
            low=cast(self.low, dtype),
            B=cast(self.B, dtype),
            down_A=cast(self.down_A, dtype),
            low_update=cast(self.low_update, dtype),
            update=cast(self.update, dtype),
            biases=cast(self.biases, dtype),
        )

    def floating(self) -> tuple[Tensor | None, ...]:
        """The tensors that get gradients, in the order of `FLOATING`; None where there is none."""
        return (
            *self.pre_activations,
            self.low,
            *self.B,
            self.down_A,
            self.routing_weights,
            self.low_update,
            *(self.update or (None, None, None)),
            *(self.scales or (None, None)),
        )

    def constants(self) -> tuple[Tensor | None, ...]:
        """The tensors that get none: expert_ids, both biases and the dropout's seed."""
        seed = None if self.dropout is None else self.dropout.seed
        return self.expert_ids, *(self.biases or (None, None)), seed


class ExpertsOutput(NamedTuple):
    """What a round of experts gives.

    Attributes:
        hidden: [N, F].
        low_down: [N, n*r].
        both: [N, F + n*r], the two side by side, which are then its columns; None where they are tensors of their own.
    """

    hidden: Tensor
    low_down: Tensor
    both: Tensor | None = None


# The names of gradients, and of the registered operator's tensors.
FLOATING = (
    *("gate", "up", "low", "gate_B", "up_B", "down_A", "routing_weights", "low_update"),
    *("state", "fold_gate", "fold_up", "gate_scale", "up_scale"),
)
