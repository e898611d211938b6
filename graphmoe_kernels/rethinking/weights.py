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

    def sources(self) -> list[Tensor | None]:
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
        """See `BaseMLP.project_in`."""
        return F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias)

    def project_out(self, c: Tensor) -> Tensor:
        """See `BaseMLP.project_out`."""
        return F.linear(c, self.down, self.down_bias)

    def dense(self) -> DenseMLP:
        """Itself."""
        return self

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `BaseMLP.biases`."""
        return self.gate_bias, self.up_bias, self.down_bias

    def sources(self) -> list[Tensor | None]:
        """Its tensors."""
        return list(self)

    def stores_dense(self) -> bool:
        """True."""
        return True


class ExpertWeights(NamedTuple):
    """LoRA pairs of n experts of rank r on gate, up and down, and DoRA's magnitudes, all three or none.

    gate_A, up_A [n, r, D]; gate_B, up_B [n, F, r]; down_A [n, r, F]; down_B [n, D, r]; gate_magnitude, up_magnitude
    [n, F]; down_magnitude [n, D].
    """

    gate_A: Tensor
    gate_B: Tensor
    up_A: Tensor
    up_B: Tensor
    down_A: Tensor
    down_B: Tensor
    gate_magnitude: Tensor | None = None
    up_magnitude: Tensor | None = None
    down_magnitude: Tensor | None = None

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A and B of gate, up and down."""
        return self.gate_A, self.gate_B, self.up_A, self.up_B, self.down_A, self.down_B

    @property
    def magnitudes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Those of gate, up and down, or None without DoRA; ``ValueError`` for one or two of the three."""
        gate, up, down = self.gate_magnitude, self.up_magnitude, self.down_magnitude
        if gate is None or up is None or down is None:
            if gate is None and up is None and down is None:
                return None
            missing = [name for name in self._fields[6:] if getattr(self, name) is None]
            raise ValueError(
                f"DoRA's magnitudes belong together, and {' and '.join(missing)} is missing: pass all three or none"
            )
        return gate, up, down


class LinearRouters(NamedTuple):
    """A router for each linear, on that linear's own input: its experts are mixed inside it.

    gate, up [n, D]; down [n, F].
    """

    gate: Tensor
    up: Tensor
    down: Tensor


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
    """Everything a rethinking layer computes with.

    Attributes:
        base: the frozen MLP.
        router: [n, D], one router that chooses whole experts; or one for each linear; or None for a single expert.
        experts: their weights.
        gru: there if there is a second round.
    """

    base: BaseMLP
    router: Tensor | LinearRouters | None
    experts: ExpertWeights
    gru: GRUWeights | None

    @property
    def down_router(self) -> Tensor | None:
        """[n, F], the router that reads the down projection's input, where every linear has one."""
        return self.router.down if isinstance(self.router, LinearRouters) else None

    def input_router(self) -> Tensor | None:
        """The routers that read x, one over the other: [n, D], or [2n, D] (gate, up) where every linear has one."""
        if isinstance(self.router, LinearRouters):
            return torch.cat([self.router.gate, self.router.up])
        return self.router

    def routers(self) -> list[Tensor]:
        """All of them, in the order in which `RethinkingOutput` counts."""
        if isinstance(self.router, LinearRouters):
            return list(self.router)
        return [] if self.router is None else [self.router]


class RethinkingSpec(NamedTuple):
    """The settings of a rethinking layer.

    Attributes:
        rounds: T; 1 is the plain mixture of LoRA experts.
        top_k: experts a token and round; n where all are mixed.
        scale: s = alpha / r.
        activation: the MLP's, by a name of `graphmoe_kernels.ACTIVATIONS`.
        normalize: divide the chosen routing weights by their sum.
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
