"""Self-rethinking as GraphMoE's Algorithm 1 reads (Eq. 1 to 7): the oracle of everything else in this package.

Nothing is folded, combined early or shared: every expert's adapted weights W + s B A (or DoRA's) are formed, every
expert runs on every token, and the routing weights pick afterwards. Use it in fp64 to judge, never to run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.rethinking.chosen import SingleExpert
from graphmoe_kernels.rethinking.kinds import LayerWeights
from graphmoe_kernels.rethinking.mixed import MixedExperts
from graphmoe_kernels.rethinking.weights import RethinkingSpec


def rethink_reference(x: Tensor, weights: LayerWeights, spec: RethinkingSpec) -> Tensor:
    """y_T [N, D] for x [N, D]; see `graphmoe_kernels.rethink` for the settings. Dropout must be 0."""
    if spec.dropout:
        raise ValueError("rethink_reference has no dropout; pass a spec with dropout=0")
    squash = torch.sigmoid if spec.candidate_activation == "sigmoid" else torch.tanh
    gru = weights.gru
    h = x.new_zeros(x.shape[0], 0 if gru is None else gru.width)  # [N, G]
    for t in range(1, spec.rounds + 1):
        y = _mixture(x, weights, spec)
        if t == spec.rounds:
            return y
        assert gru is not None
        z = torch.sigmoid(F.linear(torch.cat([h, y], dim=1), gru.update))
        q = torch.sigmoid(F.linear(torch.cat([h, y], dim=1), gru.reset))
        read = y if spec.candidate_input == "expert_output" else x
        candidate = squash(F.linear(torch.cat([q * h, read], dim=1), gru.candidate, gru.candidate_bias))
        h = (1 - z) * h + z * candidate
        x = x + F.linear(h, gru.output)
    raise ValueError(f"rounds must be at least 1, got {spec.rounds}")


def _mixture(x: Tensor, weights: LayerWeights, spec: RethinkingSpec) -> Tensor:
    """sum_i p_i E_i(x) by one router, or an MLP of linears that each mix their own experts by a router of their own."""
    kind: Any = weights.experts
    if isinstance(kind, MixedExperts):
        routers = kind.linear_routers
        gate = _mixed_linear(x, weights, spec, "gate", routers.gate)
        up = _mixed_linear(x, weights, spec, "up", routers.up)
        hidden = get_activation(spec.activation).function(gate) * up
        return _mixed_linear(hidden, weights, spec, "down", routers.down)
    if isinstance(kind, SingleExpert):
        return _expert(x, weights, spec, 0)
    mixing = _mixing(x, kind.router, spec)  # [N, n]
    return torch.stack([mixing[:, i, None] * _expert(x, weights, spec, i) for i in range(mixing.shape[1])]).sum(0)


def _mixing(x: Tensor, router: Tensor, spec: RethinkingSpec) -> Tensor:
    """Routing weights [N, n], zero outside the top k, with the softmax in fp32 at least."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(F.linear(x.to(dtype), router.to(dtype)), dim=-1)
    values, chosen = torch.topk(probabilities, spec.top_k, dim=-1)
    if spec.normalize:
        values = values / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(1, chosen, values).to(x.dtype)


def _expert(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, i: int) -> Tensor:
    """E_i(x) = W~_D (act(W~_G x) * (W~_U x))."""
    gate, up = (_adapted_linear(x, weights, spec, name, i) for name in ("gate", "up"))
    return _adapted_linear(get_activation(spec.activation).function(gate) * up, weights, spec, "down", i)


def _mixed_linear(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, name: str, router: Tensor) -> Tensor:
    """W x + b + sum_i p_i(x) (W~_i x - W x): plug-in experts of one linear."""
    mixing = _mixing(x, router, spec)
    plain = F.linear(x, getattr(weights.base.dense(), name), getattr(weights.base.dense(), f"{name}_bias"))
    y = plain
    for i in range(router.shape[0]):
        y = y + mixing[:, i, None] * (_adapted_linear(x, weights, spec, name, i) - plain)
    return y


def _adapted_linear(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, name: str, i: int) -> Tensor:
    """W~ x + b with W~ = W + s B_i A_i; with DoRA m_i * (W + s B_i A_i) / ||W + s B_i A_i||, row by row."""
    base, lora = weights.base.dense(), weights.experts.lora
    adapted = getattr(base, name) + spec.scale * getattr(lora, f"{name}_B")[i] @ getattr(lora, f"{name}_A")[i]
    if lora.magnitudes is not None:
        norm = torch.linalg.vector_norm(adapted.detach(), dim=1)
        adapted = (getattr(lora.magnitudes, name)[i] / norm)[:, None].to(adapted.dtype) * adapted
    return F.linear(x, adapted, getattr(base, f"{name}_bias"))
