"""The steps that the literal and the folded recurrence share: routing, one round of experts, the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.experts import expert_swiglu
from graphmoe_kernels.rethinking.weights import BaseMLP, ExpertWeights, RethinkingOutput, RethinkingSpec
from graphmoe_kernels.routing import Routing, topk_softmax_routing


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """R x in fp32 at least, whatever autocast says: [N, n]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), router.to(dtype))


def low_rank(x: Tensor, A: Tensor) -> Tensor:
    """A_i x of all experts, [N, n*r], for A [n, r, D]."""
    return F.linear(x, A.flatten(0, 1).to(x.dtype))


def wide_B(B: Tensor) -> Tensor:
    """The experts' B [n, D, r] side by side, [D, n*r]: what an [N, n*r] activation is multiplied with."""
    return B.permute(1, 0, 2).flatten(1)


def draw_seed(spec: RethinkingSpec) -> Tensor | None:
    """A fresh dropout seed from torch's generator, or None without dropout."""
    return torch.randint(2**62, (1,), dtype=torch.int64) if spec.dropout > 0 else None


def route(logits: Tensor, spec: RethinkingSpec, token_mask: Tensor | None, backend: str) -> Routing:
    """This round's routing under the layer's settings."""
    return topk_softmax_routing(
        logits,
        spec.top_k,
        normalize=spec.normalize,
        statistics=spec.statistics,
        token_mask=token_mask,
        backend=backend,
    )


def expert_round(
    gate: Tensor,
    up: Tensor,
    low_gate: Tensor,
    low_up: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    spec: RethinkingSpec,
    backend: str,
    update: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None),
) -> tuple[Tensor, Tensor]:
    """c [N, F] and z [N, n*r] of one round; ``update`` is (H, M_gate, M_up) in a folded round."""
    state, fold_gate, fold_up = update
    return expert_swiglu(
        gate,
        up,
        low_gate,
        low_up,
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
        dropout=spec.dropout,
        seed=draw_seed(spec),
        backend=backend,
    )


def mixed_weight(routing: Routing, spec: RethinkingSpec, dtype: torch.dtype) -> Tensor | None:
    """sum_j w_j, [N, 1], or None when it is 1 by construction."""
    return None if spec.normalize else routing.weights.sum(dim=-1, keepdim=True).to(dtype)


def output(
    base: BaseMLP, c: Tensor, z: Tensor, experts: ExpertWeights, routing: Routing, spec: RethinkingSpec
) -> Tensor:
    """y = W_D c + s B_D z + (sum_j w_j) b_D, [N, D]: one down projection whatever k is."""
    y = base.project_out(c) + F.linear(z, spec.scale * wide_B(experts.down_B).to(z.dtype))
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
