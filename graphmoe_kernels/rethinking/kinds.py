"""The two forms in which both loops know a layer's experts, whatever their kind.

A kind (`graphmoe_kernels.rethinking.chosen`, `graphmoe_kernels.rethinking.mixed`) has the weights as they are trained
and says how a round is routed. Cast to the compute dtype its experts say how they run a round, how they give the output
and, in the folded loop, their part of the fold.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from graphmoe_kernels.experts.operands import GateUp, LowRankUpdate
from graphmoe_kernels.rethinking.call import Call
from graphmoe_kernels.rethinking.down import Down, RoundOutput
from graphmoe_kernels.rethinking.weights import BaseMLP, ExpertWeights, GRUWeights


class RoundInputs(NamedTuple):
    """What a round's experts read.

    Attributes:
        pre_activations: [N, F] each, the base's (`CastExperts.read`); those of round 1 in a folded round.
        low: [N, 2nr], A x of every expert: gate, then up.
        update: H and the products that it is multiplied with, in a folded round.
        low_update: [N, 2nr], (A W_g) H, in a folded round.
    """

    pre_activations: GateUp
    low: Tensor
    update: LowRankUpdate | None = None
    low_update: Tensor | None = None


class ExpertKind(Protocol):
    """Experts of one kind with their routers, as they are trained."""

    @property
    def lora(self) -> ExpertWeights:
        """Their LoRA pairs and magnitudes."""
        ...

    def routers(self) -> list[Tensor]:
        """All routers' weights, in the order in which `RethinkingOutput` counts."""
        ...

    def route(self, x: Tensor, call: Call) -> Any:
        """Route x [N, D], in fp32 at least; the result is for `CastExperts.round` and `route_later` alone."""
        ...

    def check_kernels(self, top_k: int, width: int, activation: str) -> None:
        """`ValueError` for what the Triton kernels do not take; ``width`` is that of the fold's GRU, 0 without one."""
        ...

    def fold_routers(self, output: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Multiply the routers that read x with W_g [D, G'], in fp32 or, for experts in fp64, in fp64."""
        ...

    def route_later(self, products: tuple[Tensor, ...], total: Tensor, first: Any, call: Call) -> Any:
        """Route a round by those products and H [N, G']; the logits of its ``first`` round's routing are added."""
        ...

    def cast(self, base: BaseMLP, dtype: torch.dtype, scale: float, copy: bool) -> CastExperts:
        """Cast and join the experts' weights, differentiably; with ``copy`` nothing is shared with them."""
        ...


class CastExperts(Protocol):
    """Experts of one kind in the compute dtype."""

    @property
    def low_A(self) -> Tensor:
        """A of gate and up, all experts, [2nr, D]."""
        ...

    @property
    def down(self) -> Down:
        """What comes after the SwiGLU: the output, and what the GRU reads."""
        ...

    def read(self, pre_activations: GateUp) -> GateUp:
        """Take the base's pre-activations as `round` reads them: with DoRA without their biases."""
        ...

    def round(self, inputs: RoundInputs, routing: Any, call: Call) -> RoundOutput:
        """Run the experts of a round up to the down projection."""
        ...

    def fold_update(self, products: GateUp) -> GateUp:
        """Prepare W_G W_g and W_U W_g [F, G'] for `RoundInputs.update`."""
        ...


class LayerWeights(NamedTuple):
    """Everything a rethinking layer computes with.

    Attributes:
        base: the frozen MLP.
        experts: of one kind, with their routers: `ChosenExperts`, `SingleExpert` or `MixedExperts`.
        gru: there if there is a second round.
    """

    base: BaseMLP
    experts: ExpertKind
    gru: GRUWeights | None = None
