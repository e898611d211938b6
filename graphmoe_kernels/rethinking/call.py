"""What the rounds of one call have in common, and the operators as the rounds call them: unchecked, on one backend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend, without_autocast
from graphmoe_kernels.experts.dropout import drop
from graphmoe_kernels.experts.operands import Dropout, ExpertOperands, ExpertsOutput, GateUp, LowRankUpdate
from graphmoe_kernels.experts.run import run_round, run_swiglu
from graphmoe_kernels.gru.run import run_gru_step
from graphmoe_kernels.registration import unseen
from graphmoe_kernels.rethinking.weights import RethinkingSpec
from graphmoe_kernels.routing import Routing
from graphmoe_kernels.routing.run import run_routing
from graphmoe_kernels.structures import cast

_AS_IT_IS: AbstractContextManager[None] = nullcontext()  # one for all: it holds no state


class Call(NamedTuple):
    """What every round of one call reads.

    Attributes:
        spec: the layer's settings.
        backend: ``"triton"``, ``"torch"`` or ``"reference"``.
        autocast: whether products are cast as autocast says. The operators are kept out of it.
        unseen: see `graphmoe_kernels.registration.unseen`; under autocast every operator asks for itself.
    """

    spec: RethinkingSpec
    backend: str
    autocast: bool
    unseen: bool

    def route(self, x: Tensor, router: Tensor, offset: Tensor | None = None) -> Routing:
        """Route x by ``router``; see `graphmoe_kernels.route_tokens`."""
        top_k, normalize, backend = self.spec.top_k, self.spec.normalize, self.backend
        with self._uncast(x):
            return run_routing(
                x, router, top_k, offset=offset, normalize=normalize, backend=backend, unseen=self.unseen
            )

    def experts(self, operands: ExpertOperands) -> ExpertsOutput:
        """Give what a round of experts gives; see `graphmoe_kernels.expert_swiglu`."""
        if self.autocast:
            operands = operands.cast()
        with self._uncast(operands.low):
            return run_round(operands, self.spec.scale, self.spec.activation, self.backend, unseen=self.unseen)

    def swiglu(self, pre_activations: GateUp, update: LowRankUpdate | None = None) -> Tensor:
        """Give act(g) * u, [N, F]; see `graphmoe_kernels.swiglu`."""
        gate = pre_activations.gate
        if self.autocast:
            update = cast(update, gate.dtype)
        with self._uncast(gate):
            return run_swiglu(pre_activations, update, self.spec.activation, self.backend, unseen=self.unseen)

    def gru_step(
        self, inputs: Tensor, before: GRUState | None, candidate_weight: Tensor, candidate_bias: Tensor
    ) -> Tensor:
        """Give h' beside H', [N, 2G]; see `graphmoe_kernels.gru_step`."""
        weight, bias = candidate_weight, candidate_bias
        if bias.dtype is torch.float64 and self.backend == "triton":
            bias = bias.float()
        if self.autocast:  # products before it may have come in another dtype than the state
            before, weight = cast(before, inputs.dtype), cast(weight, inputs.dtype)
        recurrent, last, total = (None, None, None) if before is None else before
        activation, backend = self.spec.candidate_activation, self.backend
        with self._uncast(inputs):
            return run_gru_step(inputs, recurrent, last, total, weight, bias, activation, backend, unseen=self.unseen)

    def _uncast(self, x: Tensor) -> AbstractContextManager[None]:
        return without_autocast(x) if self.autocast else _AS_IT_IS

    def drop(self, x: Tensor) -> Tensor:
        """Give x with LoRA's dropout on it; x itself outside training."""
        return drop(x, self.spec.dropout) if self.spec.dropout > 0 else x

    def draw_dropout(self, device: torch.device) -> Dropout | None:
        """Draw a fresh seed from the device's generator for the dropout inside the operator; None without dropout."""
        if self.spec.dropout == 0:
            return None
        return Dropout(self.spec.dropout, torch.randint(2**62, (1,), dtype=torch.int64, device=device))


class GRUState(NamedTuple):
    """What a GRU step reads of the steps before it.

    Attributes:
        recurrent: W_z h beside W_r h, [N, 2G].
        last, total: h and H, the sum of all states so far, [N, G] each.
    """

    recurrent: Tensor
    last: Tensor
    total: Tensor


def make_call(x: Tensor, spec: RethinkingSpec, backend: str) -> Call:
    """Resolve the settings of a call on x.

    Raises:
        ValueError: the backend cannot run on x (`graphmoe_kernels.backend.resolve_backend`).
    """
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return Call(spec, resolve_backend(backend, "x", x), autocast, not autocast and unseen(x))
