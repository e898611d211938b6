"""The steps that the literal and the folded recurrence share: routing, one round of experts, the output."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend
from graphmoe_kernels.experts import expert_swiglu
from graphmoe_kernels.launching import SKINNY_TOKENS
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.weights import BaseMLP, ExpertWeights, RethinkingOutput, RethinkingSpec
from graphmoe_kernels.routing import Routing, expert_order, route_tokens


class PreparedExperts(NamedTuple):
    """The experts as the operators take them, in the compute dtype.

    Attributes:
        low_A: A of gate and up, all experts, [2nr, D]: one product gives what `expert_swiglu` calls ``low``.
        gate_B, up_B: [n, F, r]; down_A: [n, r, F].
        down_B: s B_D of all experts side by side, [D, n*r]: what an [N, n*r] activation is multiplied with.
    """

    low_A: Tensor
    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor
    down_B: Tensor


def prepare_experts(experts: ExpertWeights, dtype: torch.dtype, scale: float, copy: bool = False) -> PreparedExperts:
    """Casts and joins the experts' weights, differentiably; with ``copy`` nothing is shared with them."""
    low_A = torch.cat([experts.gate_A.flatten(0, 1), experts.up_A.flatten(0, 1)]).to(dtype)
    gate_B, up_B, down_A = (t.to(dtype, copy=copy) for t in (experts.gate_B, experts.up_B, experts.down_A))
    down_B = scale * experts.down_B.permute(1, 0, 2).flatten(1)
    return PreparedExperts(low_A, gate_B, up_B, down_A, down_B.to(dtype))


def draw_seed(spec: RethinkingSpec, device: torch.device) -> Tensor | None:
    """A fresh dropout seed from the device's generator, or None without dropout."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device) if spec.dropout > 0 else None


def route(
    x: Tensor,
    router: Tensor,
    spec: RethinkingSpec,
    token_mask: Tensor | None,
    backend: str,
    offset: Tensor | None = None,
) -> Routing:
    """This round's routing of R x (plus ``offset``) under the layer's settings, in fp32 at least."""
    with named_range("routing"):
        return route_tokens(
            x,
            router,
            spec.top_k,
            offset=offset,
            normalize=spec.normalize,
            statistics=spec.statistics,
            token_mask=token_mask,
            backend=backend,
        )


def token_order(routing: Routing, gate: Tensor, backend: str) -> Tensor | None:
    """An order of the tokens for the Triton kernels, or None where it gains nothing: elsewhere, and for few tokens.

    The first round's serves all rounds. It never changes a result, and tokens mostly keep their experts.
    """
    if resolve_backend(backend, "gate", gate) != "triton" or gate.shape[0] <= SKINNY_TOKENS:
        return None
    with named_range("routing"):
        return expert_order(routing.experts)


def project_in(base: BaseMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """The frozen projections' gate and up pre-activations, [N, F] each."""
    with named_range("mlp"):
        return base.project_in(x)


def project_low(x: Tensor, experts: PreparedExperts, spec: RethinkingSpec) -> Tensor:
    """A dropout(x) of every expert, [N, 2nr], for x [N, D]: what `expert_swiglu` calls ``low``."""
    with named_range("experts"):
        return F.linear(F.dropout(x, spec.dropout), experts.low_A)


def expert_round(
    gate: Tensor,
    up: Tensor,
    low: Tensor,
    experts: PreparedExperts,
    routing: Routing,
    spec: RethinkingSpec,
    backend: str,
    order: Tensor | None = None,
    update: tuple[Tensor, Tensor, Tensor] | None = None,
    low_update: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r] of one round; ``update`` is (H, M_gate, M_up) in a folded round."""
    state, fold_gate, fold_up = update or (None, None, None)
    with named_range("experts"):
        return expert_swiglu(
            gate,
            up,
            low,
            experts.gate_B,
            experts.up_B,
            experts.down_A,
            routing.weights,
            routing.experts,
            scale=spec.scale,
            activation=spec.activation,
            state=state,
            fold_gate=fold_gate,
            fold_up=fold_up,
            low_update=low_update,
            dropout=spec.dropout,
            seed=draw_seed(spec, gate.device),
            order=order,
            tickets=routing.tickets if routing.tickets.numel() else None,
            backend=backend,
        )


def mixed_weight(routing: Routing, spec: RethinkingSpec, dtype: torch.dtype) -> Tensor | None:
    """sum_j w_j, [N, 1], or None when it is 1 by construction."""
    return None if spec.normalize else routing.weights.sum(dim=-1, keepdim=True).to(dtype)


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x weight^T, written to y: a fresh tensor that nothing else reads."""
    return y.addmm_(x.to(y.dtype), weight.to(y.dtype).T)


def output(base: BaseMLP, c: Tensor, z: Tensor, down_B: Tensor, routing: Routing, spec: RethinkingSpec) -> Tensor:
    """y = W_D c + s B_D z + (sum_j w_j) b_D, [N, D]: one down projection whatever k is; ``down_B`` [D, n*r]
    is that of `PreparedExperts`."""
    with named_range("mlp"):
        y = base.project_out(c)
    with named_range("experts"):
        y = add_product(y, z, down_B)
    mixed = mixed_weight(routing, spec, y.dtype)
    if mixed is not None:
        bias = base.dense().down_bias
        if bias is not None:  # project_out added the bias once; unnormalised weights do not sum to one
            y = y + (mixed - 1) * bias.to(y.dtype)
    return y


def collect(y: Tensor, routings: list[Routing]) -> RethinkingOutput:
    """The output with the rounds' statistics stacked to [T, n]."""
    if routings[0].counts is None:
        return RethinkingOutput(y, None, None)
    counts = torch.stack([r.counts for r in routings if r.counts is not None])
    mass = torch.stack([r.mass for r in routings if r.mass is not None])
    return RethinkingOutput(y, counts, mass)
