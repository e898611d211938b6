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

    def sources(self) -> list[Tensor | None]:
        """The tensors that `dense` reads, as they are stored: what a cached fold depends on."""
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
        """See `BaseMLP.project_in`."""
        return F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias)

    def project_out(self, c: Tensor) -> Tensor:
        """See `BaseMLP.project_out`."""
        return F.linear(c, self.down, self.down_bias)

    def dense(self) -> DenseMLP:
        """Itself."""
        return self

    def sources(self) -> list[Tensor | None]:
        """Its tensors."""
        return list(self)


class ExpertWeights(NamedTuple):
    """LoRA pairs of n experts of rank r on gate, up and down.

    gate_A, up_A [n, r, D]; gate_B, up_B [n, F, r]; down_A [n, r, F]; down_B [n, D, r].
    """

    gate_A: Tensor
    gate_B: Tensor
    up_A: Tensor
    up_B: Tensor
    down_A: Tensor
    down_B: Tensor


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

    def input_columns(self) -> Tensor:
        """The columns that read y (or x): [3G, D] in the order update, reset, candidate."""
        width = self.width
        return torch.cat([w[:, width:] for w in (self.update, self.reset, self.candidate)])

    def recurrent_gates(self) -> Tensor:
        """The state's columns of W_z over those of W_r: [2G, G]."""
        width = self.width
        return torch.cat([self.update[:, :width], self.reset[:, :width]])

    def recurrent_candidate(self) -> Tensor:
        """The state's columns of W_o: [G, G]."""
        return self.candidate[:, : self.width]


class LayerWeights(NamedTuple):
    """Everything a rethinking layer computes with: router [n, D], experts, and a GRU if there is a second round."""

    base: BaseMLP
    router: Tensor
    experts: ExpertWeights
    gru: GRUWeights | None


class RethinkingSpec(NamedTuple):
    """The settings of a rethinking layer.

    Attributes:
        rounds: T; 1 is the plain mixture of LoRA experts.
        top_k: experts a token and round.
        scale: s = alpha / r.
        activation: the MLP's, by a name of `graphmoe_kernels.ACTIVATIONS`.
        normalize: divide the chosen routing weights by their sum.
        candidate_input: what the GRU's candidate reads besides the state: ``"expert_output"`` (y_t, Eq. 6) or
            ``"hidden_state"`` (x_t, Algorithm 1 line 31).
        candidate_activation: ``"sigmoid"`` or ``"tanh"``.
        dropout: probability on the input of every A; 0 outside training.
        statistics: None, ``"topk"`` or ``"full"``, as in `graphmoe_kernels.topk_softmax_routing`.
    """

    rounds: int
    top_k: int
    scale: float
    activation: str = "silu"
    normalize: bool = True
    candidate_input: str = "expert_output"
    candidate_activation: str = "sigmoid"
    dropout: float = 0.0
    statistics: str | None = None


class RethinkingOutput(NamedTuple):
    """y [N, D] of the last round; counts and mass [T, n] of all rounds, or None without statistics."""

    y: Tensor
    counts: Tensor | None
    mass: Tensor | None
