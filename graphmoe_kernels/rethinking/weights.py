"""What a rethinking layer is made of: its tensors, its settings, and what it returns."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class BaseMLP(Protocol):
    """The frozen MLP as the recurrence uses it; `DenseMLP` is one, a layer may wrap modules instead."""

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, D] -> gate and up pre-activations, [N, F] each, biases included."""
        ...

    def project_out(self, c: Tensor) -> Tensor:
        """c [N, F] -> [N, D], bias included."""
        ...

    def dense(self) -> DenseMLP:
        """The weights as plain tensors, dequantised if need be."""
        ...

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of gate [F], up [F] and down [D]."""
        ...

    def sources(self) -> list[Tensor]:
        """The tensors that `dense` reads, as they are stored: what a cached fold depends on."""
        ...

    def stores_dense(self) -> bool:
        """Whether the weights of `dense` are stored ones; if not, every call makes new ones of the whole MLP's size."""
        ...


class DenseMLP(NamedTuple):
    """A gated MLP as plain tensors: gate and up [F, D], down [D, F], biases [F], [F], [D] or None."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias)

    def project_out(self, c: Tensor) -> Tensor:
        return F.linear(c, self.down, self.down_bias)

    def dense(self) -> DenseMLP:
        """Itself."""
        return self

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.gate_bias, self.up_bias, self.down_bias

    def sources(self) -> list[Tensor]:
        """Its tensors."""
        return [t for t in self if t is not None]

    def stores_dense(self) -> bool:
        """True."""
        return True


class Magnitudes(NamedTuple):
    """DoRA's magnitudes of n experts: gate, up [n, F] and down [n, D]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class ExpertWeights(NamedTuple):
    """LoRA pairs of n experts of rank r on gate, up and down, and DoRA's magnitudes if the experts have them.

    gate_A, up_A [n, r, D]; gate_B, up_B [n, F, r]; down_A [n, r, F]; down_B [n, D, r].
    """

    gate_A: Tensor
    gate_B: Tensor
    up_A: Tensor
    up_B: Tensor
    down_A: Tensor
    down_B: Tensor
    magnitudes: Magnitudes | None = None

    @property
    def pairs(self) -> tuple[Tensor, ...]:
        """A and B of gate, up and down."""
        return self[:6]

    def tensors(self) -> list[Tensor]:
        """The pairs, then the magnitudes."""
        return [*self.pairs, *(self.magnitudes or ())]


class LinearRouters(NamedTuple):
    """A router for each linear, on that linear's own input: its experts are mixed inside it.

    gate, up [n, D]; down [n, F].
    """

    gate: Tensor
    up: Tensor
    down: Tensor


ALIGNMENT = 16  # the inner dimension that suits the hardware


def padded(width: int) -> int:
    """``width`` of a GRU rounded up to a multiple of `ALIGNMENT`, as both loops compute with it."""
    return -(-width // ALIGNMENT) * ALIGNMENT


class GRUWeights(NamedTuple):
    """The rethinking GRU of width G (GraphMoE, Eq. 5 to 7).

    update, reset, candidate (W_z, W_r, W_o) [G, G + D], the state's columns first; candidate_bias (b_o) [G];
    output (W_g) [D, G].
    """

    update: Tensor
    reset: Tensor
    candidate: Tensor
    candidate_bias: Tensor
    output: Tensor

    @property
    def width(self) -> int:
        """G."""
        return self.candidate_bias.shape[0]

    def padded(self) -> PaddedGRU:
        """Widen it to a multiple of 16 with units of zero weight that nothing reads, differentiably."""
        width = self.width
        extra = padded(width) - width
        gates = self.update, self.reset, self.candidate
        parts = [w.split_with_sizes((width, w.shape[1] - width), dim=1) for w in gates]  # one backward for both
        recurrent, columns = [own for own, _ in parts], [own for _, own in parts]
        if extra == 0:
            return PaddedGRU(
                torch.cat(columns), torch.cat(recurrent[:2]), recurrent[2], self.candidate_bias, self.output
            )
        zeros = columns[0].new_zeros(extra, columns[0].shape[1])
        update, reset, candidate = (F.pad(w, (0, extra, 0, extra)) for w in recurrent)
        return PaddedGRU(
            torch.cat([part for own in columns for part in (own, zeros)]),
            torch.cat([update, reset]),
            candidate,
            F.pad(self.candidate_bias, (0, extra)),
            F.pad(self.output, (0, extra)),
        )


class PaddedGRU(NamedTuple):
    """A GRU as both loops compute with it, of width G', a multiple of `ALIGNMENT`: every product's inner dimension
    suits the hardware.

    Attributes:
        input_columns: those that read y (or x), [3G', D] in the order update, reset, candidate.
        recurrent_gates: the state's columns of W_z over those of W_r, [2G', G'].
        recurrent_candidate: the state's columns of W_o, [G', G'].
        candidate_bias: [G'].
        output: W_g, [D, G'].
    """

    input_columns: Tensor
    recurrent_gates: Tensor
    recurrent_candidate: Tensor
    candidate_bias: Tensor
    output: Tensor

    @property
    def width(self) -> int:
        """G'."""
        return self.candidate_bias.shape[0]

    def cast(self, dtype: torch.dtype) -> PaddedGRU:
        """The same with all in ``dtype`` but the bias, which the step reads as it is."""
        columns, gates, candidate, bias, output = self
        return PaddedGRU(columns.to(dtype), gates.to(dtype), candidate.to(dtype), bias, output.to(dtype))


class RouterSettings(NamedTuple):
    """How a router's logits become routing weights.

    Attributes:
        top_k: experts per token; n where all are mixed.
        normalize: divide the chosen routing weights by their sum.
    """

    top_k: int
    normalize: bool = True


class RethinkingSpec(NamedTuple):
    """The settings of a rethinking layer.

    Attributes:
        rounds: T; 1 is the plain mixture of LoRA experts.
        top_k, normalize: of the routers, see `RouterSettings`.
        scale: s = alpha / r.
        activation: the MLP's, by a name of `graphmoe_kernels.ACTIVATIONS`.
        candidate_input: what the GRU's candidate reads besides the state: ``"expert_output"`` (y_t, Eq. 6) or
            ``"hidden_state"`` (x_t, Algorithm 1 line 31).
        candidate_activation: ``"sigmoid"`` or ``"tanh"``.
        dropout: probability on the input of every A; 0 outside training.
    """

    rounds: int
    top_k: int
    scale: float
    activation: str = "silu"
    normalize: bool = True
    candidate_input: str = "expert_output"
    candidate_activation: str = "sigmoid"
    dropout: float = 0.0

    @property
    def router(self) -> RouterSettings:
        """What its routers read."""
        return RouterSettings(self.top_k, self.normalize)


class RethinkingOutput(NamedTuple):
    """What T rounds give.

    Attributes:
        y: [N, D], the last round's output.
        router_logits: by router, then by round: [N, n] each, in fp32 at least, differentiable. There is one router, or
            three (gate, up, down) where every linear has its own, or none. `topk_softmax_routing` makes of them
            what the round chose, and the statistics of Eq. 8.
    """

    y: Tensor
    router_logits: tuple[tuple[Tensor, ...], ...]


def collect(y: Tensor, logits: list[tuple[Tensor, ...]]) -> RethinkingOutput:
    """The output with the logits of the routers, given by round, by router."""
    return RethinkingOutput(y, tuple(zip(*logits, strict=True)))
