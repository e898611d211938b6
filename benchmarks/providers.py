"""What is timed: one layer computed in several ways, each under a name.

A provider is given a layer's weights and settings and returns a function from x [N, D] to y_T [N, D]. All providers
compute the same mathematics from the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels import FoldCache, LayerWeights, RethinkingSpec, get_activation, gru_step, rethink

Forward = Callable[[Tensor], Tensor]


class Provider(NamedTuple):
    """A named way to compute the layer.

    Attributes:
        name: how results and tables call it.
        summary: what it is, in one line.
        prepare: (weights, spec) -> the function that is timed.
    """

    name: str
    summary: str
    prepare: Callable[[LayerWeights, RethinkingSpec], Forward]


def _rethink(fold: str, backend: str = "auto") -> Callable[[LayerWeights, RethinkingSpec], Forward]:
    """This package's layer through its public function, with a cache for the fold as a layer would keep it."""

    def prepare(weights: LayerWeights, spec: RethinkingSpec) -> Forward:
        cache = FoldCache(lambda: weights)
        return lambda x: rethink(x, weights, spec, fold=fold, cache=cache, backend=backend).y

    return prepare


def _peer_mixlora(weights: LayerWeights, spec: RethinkingSpec) -> Forward:
    """MixLoRA as published and as its users run it, once per round, joined by the same GRU."""

    def forward(x: Tensor) -> Tensor:
        pair = state = total = recurrent = None
        for t in range(spec.rounds):
            y = _mixlora_layer(x, weights, spec)
            if t == spec.rounds - 1:
                break
            gru = weights.gru
            assert gru is not None
            if pair is not None:
                state, total = pair.chunk(2, dim=1)  # [N, G] each
                recurrent = F.linear(state, gru.recurrent_gates())  # [N, 2G]
            pair = gru_step(
                F.linear(y, gru.input_columns()),
                recurrent,
                state,
                total,
                gru.recurrent_candidate(),
                gru.candidate_bias,
            )
            x = x + F.linear(pair[:, : gru.width], gru.output)
        return y

    return forward


def _mixlora_layer(x: Tensor, weights: LayerWeights, spec: RethinkingSpec) -> Tensor:
    """y [N, D]: base gate and up shared by the experts, then a loop over them, base down once per expert.

    Each expert finds its tokens by `torch.where`, once to compute and once to combine, as the published code does.
    """
    base, e = weights.base.dense(), weights.experts
    activation = get_activation(spec.activation).function
    probabilities = torch.softmax(F.linear(x.float(), weights.router.float()), dim=-1)  # [N, n]
    mixing, chosen = torch.topk(probabilities, spec.top_k, dim=-1)
    mixing = (mixing / mixing.sum(dim=-1, keepdim=True)).to(x.dtype)  # [N, k]
    chosen_by = F.one_hot(chosen, probabilities.shape[1]).permute(2, 1, 0)  # [n, k, N]

    gate, up = base.project_in(x)  # [N, F] each
    outputs = []
    for i in range(probabilities.shape[1]):
        _, tokens = torch.where(chosen_by[i])  # [m]
        read = x[tokens]
        g = gate[tokens] + spec.scale * F.linear(F.linear(read, e.gate_A[i]), e.gate_B[i])
        u = up[tokens] + spec.scale * F.linear(F.linear(read, e.up_A[i]), e.up_B[i])
        hidden = activation(g) * u  # [m, F]
        outputs.append(base.project_out(hidden) + spec.scale * F.linear(F.linear(hidden, e.down_A[i]), e.down_B[i]))

    y = torch.zeros_like(x)
    for i, output in enumerate(outputs):
        slots, tokens = torch.where(chosen_by[i])
        y = y.index_add(0, tokens, output * mixing[tokens, slots, None])
    return y


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("folded", "rethink(fold='always'): the fold cached, or rebuilt in training", _rethink("always")),
        Provider("literal", "rethink(fold='never'): the literal loop", _rethink("never")),
        Provider("reference", "the literal loop over the plain definitions", _rethink("never", "reference")),
        Provider("peer_mixlora", "a loop over experts, base down once per expert, T times", _peer_mixlora),
    )
}
