"""Self-rethinking as GraphMoE's Algorithm 1 reads (Eq. 1 to 7): the oracle of everything else in this package.

Nothing is folded, combined early or shared: every expert's adapted weights W + s B A are formed, every expert runs on
every token, and the routing weights pick afterwards. Use it in fp64 to judge, never to run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.activations import get_activation
from graphmoe_kernels.rethinking.weights import LayerWeights, RethinkingSpec


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
    """sum_j w_j E_{e_j}(x), with the softmax in fp32 at least."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(F.linear(x.to(dtype), weights.router.to(dtype)), dim=-1)  # [N, n]
    values, chosen = torch.topk(probabilities, spec.top_k, dim=-1)
    if spec.normalize:
        values = values / values.sum(dim=-1, keepdim=True)
    mixing = torch.zeros_like(probabilities).scatter(1, chosen, values).to(x.dtype)  # [N, n]
    y = torch.zeros_like(x)
    for i in range(probabilities.shape[1]):
        y = y + mixing[:, i, None] * _expert(x, weights, spec, i)
    return y


def _expert(x: Tensor, weights: LayerWeights, spec: RethinkingSpec, i: int) -> Tensor:
    """E_i(x) = W~_D (act(W~_G x) * (W~_U x)) with W~ = W + s B_i A_i."""
    base, e = weights.base.dense(), weights.experts
    gate = F.linear(x, base.gate + spec.scale * e.gate_B[i] @ e.gate_A[i], base.gate_bias)
    up = F.linear(x, base.up + spec.scale * e.up_B[i] @ e.up_A[i], base.up_bias)
    hidden = get_activation(spec.activation).function(gate) * up
    return F.linear(hidden, base.down + spec.scale * e.down_B[i] @ e.down_A[i], base.down_bias)
