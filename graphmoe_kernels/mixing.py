"""Experts that are mixed inside a linear: y = W x + b + s sum_i p_i(x) B_i A_i x, with the linear's own router for p.

Side by side the experts are one LoRA pair of rank n*r, whose low-rank activations are multiplied with p. With DoRA
y = W x + b + sum_i p_i (DoRA_i(x) - W x), so that experts which change nothing yet leave y alone whatever p is.

Source: LoRAMoE, Eq. 4 (p is a softmax over all experts) and MoLA, Eq. 2 (over the top k).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.dora import dora_scale, scaled_by, scaled_rows
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.routing import Routing, route_tokens


def mixing_weights(routing: Routing) -> Tensor:
    """[N, n]: the routing weights where a token's chosen experts stand, zero elsewhere."""
    dense = torch.zeros_like(routing.logits, dtype=routing.weights.dtype)
    return dense.scatter(1, routing.experts.long(), routing.weights)


def side_by_side(B: Tensor) -> Tensor:
    """B [n, out, r] as one of rank n*r, [out, n*r]."""
    return B.permute(1, 0, 2).flatten(1)


def weighted(low: Tensor, mixing: Tensor) -> Tensor:
    """Low-rank activations [N, m*r], each expert's r times its weight of [N, m]."""
    return (low.unflatten(1, (mixing.shape[1], -1)) * mixing.to(low.dtype)[..., None]).flatten(1)


def mixed_change(mixing: Tensor, scale: Tensor) -> Tensor:
    """sum_i p_i (m_i - 1), [N, out], for mixing weights [N, n] and DoRA's vectors m [n, out]."""
    return F.linear(mixing, (scale - 1).T.to(mixing.dtype))


class LinearExperts(NamedTuple):
    """The experts of one linear: A [n, r, in], B [n, out, r], router [n, in], and with DoRA magnitude [n, out].

    ``weight`` [out, in] and ``bias`` [out] are the linear's own, which DoRA reads; else None.
    """

    A: Tensor
    B: Tensor
    router: Tensor
    magnitude: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def sources(self) -> list[Tensor]:
        """What `prepare_linear` reads."""
        found = (self.A, self.B, self.magnitude, self.weight, self.bias)
        return [t for t in found if t is not None]


class LinearSettings(NamedTuple):
    """How a linear's experts are mixed: as in `graphmoe_kernels.RethinkingSpec`."""

    top_k: int
    scale: float
    normalize: bool = True
    dropout: float = 0.0
    statistics: str | None = None


class PreparedLinear(NamedTuple):
    """A linear's experts in the compute dtype.

    Attributes:
        A: [n*r, in].
        B: s B of all experts side by side, [out, n*r]; with DoRA its rows are scaled.
        scale: DoRA's m / ||W + s B A||, [n, out], or None.
        bias: [out] where DoRA has to tell it from the product, or None.
    """

    A: Tensor
    B: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [t for t in self if t is not None]


def prepare_linear(experts: LinearExperts, dtype: torch.dtype, scale: float, copy: bool = False) -> PreparedLinear:
    """Casts and joins, differentiably; with ``copy`` nothing is shared with the experts' tensors."""
    with torch.autocast(experts.A.device.type, enabled=False):
        vectors = None
        if experts.magnitude is not None and experts.weight is not None:
            vectors = dora_scale(experts.magnitude, experts.weight, experts.A, experts.B, scale)
        B = scale * side_by_side(scaled_rows(experts.B, vectors))
        A = experts.A.flatten(0, 1).to(dtype, copy=copy)
        bias = None if vectors is None or experts.bias is None else experts.bias.to(dtype, copy=copy)
        return PreparedLinear(A, B.to(dtype), vectors, bias)


def mix_linear(
    y: Tensor,
    x: Tensor,
    router: Tensor,
    experts: PreparedLinear,
    settings: LinearSettings,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Routing]:
    """What a linear with mixed experts gives.

    Args:
        y: [N, out], the linear's own output, bias included.
        x: [N, in], its input.
        router: [n, in].
        experts: of `prepare_linear`, in the dtype of ``y``.
        settings: see `LinearSettings`.
        token_mask: [N], False where a token is padding; only the statistics read it.
        backend: of the routing; see `graphmoe_kernels.backend`.

    Returns:
        [N, out] in the dtype of ``y``, and the routing with its statistics.
    """
    with named_range("routing"):
        routing = route_tokens(
            x,
            router,
            settings.top_k,
            normalize=settings.normalize,
            statistics=settings.statistics,
            token_mask=token_mask,
            backend=backend,
        )
        mixing = mixing_weights(routing)
    with named_range("experts"):
        low = weighted(F.linear(F.dropout(x.to(y.dtype), settings.dropout), experts.A), mixing)  # [N, n*r]
        if experts.scale is None:
            return torch.addmm(y, low, experts.B.T), routing
        change = mixed_change(mixing, experts.scale)
        if experts.bias is None:
            return torch.addmm(scaled_by(y, change), low, experts.B.T), routing
        scaled = scaled_by(y - experts.bias, change)
        return torch.addmm(scaled, low, experts.B.T) + experts.bias, routing
