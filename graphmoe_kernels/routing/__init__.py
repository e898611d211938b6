"""Top-k softmax routing: which experts a token goes to, how strongly, and how evenly experts are used."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import resolve_backend
from graphmoe_kernels.routing import reference

STATISTICS = ("topk", "full")


class Routing(NamedTuple):
    """What the router decided for N tokens over n experts.

    Attributes:
        weights: [N, k] fp32 (fp64 for fp64 logits), differentiable.
        experts: [N, k] int64, distinct within a row, by falling probability.
        counts: [n], how many counted tokens chose each expert; None unless statistics were asked for.
        mass: [n], differentiable; each expert's routing probability summed over the counted tokens, from the top-k
            entries alone (``statistics="topk"``, the paper's Eq. 8) or from the whole softmax (``"full"``).
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor | None
    mass: Tensor | None


def topk_softmax_routing(
    logits: Tensor,
    top_k: int,
    *,
    normalize: bool = True,
    statistics: str | None = None,
    token_mask: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Softmax over the experts, the ``top_k`` largest, optionally renormalised (GraphMoE, section 3 and Eq. 4).

    A row with a non-finite logit gets non-finite weights and experts that are still valid indices.

    Args:
        logits: [N, n], any float dtype; the softmax runs in fp32 at least.
        top_k: experts a token, 1 <= top_k <= n.
        normalize: divide the chosen probabilities by their sum.
        statistics: None, ``"topk"`` or ``"full"``: whether `Routing.counts` and `Routing.mass` are computed, and how.
        token_mask: [N], bool or 0/1; tokens that the statistics leave out (padding) are False. Routing ignores it.
        backend: see `graphmoe_kernels.backend`.

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: a wrong rank, ``top_k`` outside 1..n, an unknown ``statistics`` or backend, a mask of another shape
            or on another device.
    """
    resolve_backend(backend, "logits", logits)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() != 2:
        raise ValueError(f"logits must be [tokens, experts], got shape {tuple(logits.shape)}; flatten the batch first")
    num_experts = logits.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..{num_experts} (the number of experts), got {top_k}")
    if statistics is not None and statistics not in STATISTICS:
        raise ValueError(f"unknown statistics {statistics!r}; expected None, 'topk' or 'full'")
    if token_mask is not None and token_mask.shape != logits.shape[:1]:
        raise ValueError(f"token_mask must be [{logits.shape[0]}], got shape {tuple(token_mask.shape)}")
    if token_mask is not None and token_mask.device != logits.device:
        raise ValueError(f"token_mask is on {token_mask.device}, logits on {logits.device}; put them on one device")
    with torch.autocast(logits.device.type, enabled=False):
        return Routing(*reference.route(logits, top_k, normalize, statistics, token_mask))
