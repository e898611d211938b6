"""One linear with mixed experts, outside of an MLP: an attention projection of MoLA. See `graphmoe_kernels.mixing`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.backend import without_autocast
from graphmoe_kernels.dora import dora_scale, scaled_by, scaled_rows
from graphmoe_kernels.experts.dropout import drop
from graphmoe_kernels.mixing import mixed_change, mixing_weights, side_by_side, weighted
from graphmoe_kernels.ranges import named_range
from graphmoe_kernels.rethinking.folding import FoldSettings
from graphmoe_kernels.rethinking.weights import RouterSettings
from graphmoe_kernels.routing import Routing, route_tokens
from graphmoe_kernels.structures import cast, tensors_in
from graphmoe_kernels.validation import check_type


class LinearExperts(NamedTuple):
    """The experts of one linear: A [n, r, in], B [n, out, r], and with DoRA magnitude [n, out].

    ``weight`` [out, in] and ``bias`` [out] are the linear's own, which DoRA reads; else None.
    """

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def sources(self) -> list[Tensor]:
        """All of them."""
        return tensors_in(self)


class PreparedLinear(NamedTuple):
    """A linear's experts in the compute dtype.

    Attributes:
        A: [n*r, in].
        B: s B of all experts side by side, [out, n*r]; with DoRA its rows are scaled.
        change: DoRA's m / ||W + s B A|| - 1, [n, out] in fp32 at least, or None.
        bias: [out] where DoRA has to tell it from the product, or None.
    """

    A: Tensor
    B: Tensor
    change: Tensor | None
    bias: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All of them; the first is in the compute dtype."""
        return tensors_in(self)


def prepare_linear(experts: LinearExperts, settings: FoldSettings, copy: bool = False) -> PreparedLinear:
    """Casts and joins, differentiably; with ``copy`` nothing is shared with the experts' tensors.

    Raises:
        TypeError: ``experts`` are no `LinearExperts`, or ``settings`` no `FoldSettings`.
        ValueError: a magnitude without the linear's weight, or the other way about: DoRA needs both.
    """
    check_type("experts", experts, LinearExperts)
    check_type("settings", settings, FoldSettings)
    if (experts.magnitude is None) != (experts.weight is None):
        raise ValueError("DoRA's magnitude and the linear's weight belong together: pass both or none")
    dtype, scale, vectors, change = settings.dtype, settings.scale, None, None
    with without_autocast(experts.A):
        if experts.magnitude is not None and experts.weight is not None:
            vectors = dora_scale(experts.magnitude, experts.weight, experts.A, experts.B, scale)
            change = vectors - 1
        B = scale * side_by_side(scaled_rows(experts.B, vectors))
        A, bias = cast(experts.A.flatten(0, 1), dtype, copy), cast(experts.bias, dtype, copy)
        return PreparedLinear(A, B.to(dtype), change, bias)


def mix_linear(
    y: Tensor,
    x: Tensor,
    router: Tensor,
    experts: PreparedLinear,
    settings: RouterSettings,
    *,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Routing]:
    """What a linear with mixed experts gives.

    Args:
        y: [N, out], the linear's own output, bias included.
        x: [N, in], its input.
        router: [n, in].
        experts: of `prepare_linear`, in the dtype of ``y``.
        settings: of the router.
        dropout: probability on the input of A; 0 outside training.
        backend: of the routing; see `graphmoe_kernels.backend`.

    Returns:
        [N, out] in the dtype of ``y``, and the routing.

    Raises:
        TypeError: ``experts`` are not of `prepare_linear`, or ``settings`` no `RouterSettings`; and what `route_tokens`
            refuses.
    """
    if not isinstance(experts, PreparedLinear):
        raise TypeError(f"experts must be a PreparedLinear, as prepare_linear makes it, got {type(experts).__name__}")
    check_type("settings", settings, RouterSettings)
    with named_range("routing"):
        top_k, normalize = settings
        routing = route_tokens(x, router, top_k, normalize=normalize, backend=backend)
        mixing = mixing_weights(routing)
    with named_range("experts"):
        x = x.to(y.dtype)
        low = weighted(F.linear(drop(x, dropout) if dropout > 0 else x, experts.A), mixing)  # [N, n*r]
        if experts.change is not None:
            change, bias = mixed_change(mixing, experts.change), experts.bias
            y = scaled_by(y, change) if bias is None else scaled_by(y - bias, change) + bias
        return torch.addmm(y, low, experts.B.T), routing
