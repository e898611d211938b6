"""The layer as one writes it in plain PyTorch: what torch.compile is given, and the GRU that joins peers' rounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels import ChosenExperts, GRUWeights, LayerWeights, RethinkingSpec, get_activation

Forward = Callable[[Tensor], Tensor]


def plain_literal(weights: LayerWeights, spec: RethinkingSpec) -> Forward:
    """The literal loop without a Python loop over experts, a gather or a host sync: nothing hides from a compiler.

    The low-rank products of all experts run at once, n*r wide; a mask picks each slot's expert. At the paper's sizes
    that is 6% more arithmetic than the chosen experts need. Experts are combined before the base's down projection.
    There is no dropout in it.
    """
    base, e = weights.base.dense(), weights.experts.lora
    experts, rank, _ = e.gate_A.shape
    activation = get_activation(spec.activation).function

    def layer(x: Tensor) -> Tensor:
        mixing, chosen = route(x, weights, spec)  # [N, k] each
        gate, up = base.project_in(x)  # [N, F] each
        low_gate, low_up = F.linear(x, e.gate_A.flatten(0, 1)), F.linear(x, e.up_A.flatten(0, 1))  # [N, n*r] each
        gate_B, up_B, down_B = (t.permute(1, 0, 2).flatten(1) for t in (e.gate_B, e.up_B, e.down_B))  # [out, n*r]
        down_A = e.down_A.flatten(0, 1)  # [n*r, F]
        c, z = torch.zeros_like(gate), torch.zeros_like(low_gate)
        for j in range(spec.top_k):
            mask = F.one_hot(chosen[:, j], experts).to(x.dtype).repeat_interleave(rank, dim=1)  # [N, n*r]
            g = gate + spec.scale * F.linear(low_gate * mask, gate_B)
            u = up + spec.scale * F.linear(low_up * mask, up_B)
            hidden = mixing[:, j, None] * activation(g) * u  # [N, F]
            c = c + hidden
            z = z + mask * F.linear(hidden, down_A)
        return base.project_out(c) + spec.scale * F.linear(z, down_B)

    return rounds_of(layer, weights.gru, spec)


def route(x: Tensor, weights: LayerWeights, spec: RethinkingSpec) -> tuple[Tensor, Tensor]:
    """The weights and the numbers of the chosen experts, [N, k] each."""
    wide = at_least_fp32(x.dtype)
    assert isinstance(weights.experts, ChosenExperts)
    probabilities = torch.softmax(F.linear(x.to(wide), weights.experts.router.to(wide)), dim=-1)  # [N, n]
    mixing, chosen = torch.topk(probabilities, spec.top_k, dim=-1)
    if spec.normalize:
        mixing = mixing / mixing.sum(dim=-1, keepdim=True)
    return mixing.to(x.dtype), chosen


def rounds_of(layer: Forward, gru: GRUWeights | None, spec: RethinkingSpec) -> Forward:
    """y_T: ``layer`` once per round, its input moved in between by the GRU at the padded width that ours has."""
    padded = None if gru is None else _padded(gru)

    def forward(x: Tensor) -> Tensor:
        state = None
        for _ in range(spec.rounds - 1):
            assert padded is not None
            weights = padded()
            state = _next_state(x, layer(x), state, weights, spec)
            x = x + F.linear(state, weights.output)
        return layer(x)

    return forward


def _padded(gru: GRUWeights) -> Callable[[], GRUWeights]:
    """The weights with zeros up to a multiple of 16 states, made anew for a backward and after every write."""
    G, more = gru.width, -gru.width % 16
    kept: dict[tuple[int, ...], GRUWeights] = {}

    def wide(weight: Tensor) -> Tensor:  # [G, G + D] -> [G', G' + D]
        return torch.cat([F.pad(weight[:, :G], (0, more, 0, more)), F.pad(weight[:, G:], (0, 0, 0, more))], dim=1)

    def make() -> GRUWeights:
        update, reset, candidate = (wide(weight) for weight in (gru.update, gru.reset, gru.candidate))
        bias, output = (F.pad(t, (0, more)) for t in (gru.candidate_bias, gru.output))  # [G'], [D, G']
        return GRUWeights(update, reset, candidate, bias, output)

    def padded() -> GRUWeights:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return make()
        versions = tuple(t._version for t in gru)
        if versions not in kept:
            kept.clear()
            kept[versions] = make()
        return kept[versions]

    return padded


def _next_state(x: Tensor, y: Tensor, state: Tensor | None, gru: GRUWeights, spec: RethinkingSpec) -> Tensor:
    """h' [N, G] by GraphMoE's Eq. 5 and 6; h is zero where ``state`` is None. The gates are formed in fp32 at least."""
    wide = at_least_fp32(y.dtype)
    squash = torch.sigmoid if spec.candidate_activation == "sigmoid" else torch.tanh
    read = y if spec.candidate_input == "expert_output" else x
    if state is None:
        z = torch.sigmoid(F.linear(y, gru.update[:, gru.width :]).to(wide))
        c = squash(F.linear(read, gru.candidate[:, gru.width :], gru.candidate_bias).to(wide))
        return (z * c).to(y.dtype)
    both, h = torch.cat([state, y], dim=1), state.to(wide)  # [N, G + D], [N, G]
    z = torch.sigmoid(F.linear(both, gru.update).to(wide))
    q = torch.sigmoid(F.linear(both, gru.reset).to(wide))
    reset = torch.cat([(q * h).to(y.dtype), read], dim=1)  # [N, G + D]
    c = squash(F.linear(reset, gru.candidate, gru.candidate_bias).to(wide))
    return ((1 - z) * h + z * c).to(y.dtype)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which routing and gates are computed."""
    return torch.promote_types(dtype, torch.float32)
