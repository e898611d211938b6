"""Top-k softmax routing (GraphMoE, Eq. 4 and 8; the routing of MixLoRA), in plain PyTorch.

It is the oracle and the CPU path at once: a softmax over a few experts is a handful of small, fast calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphmoe_kernels.exact_linear import exact_linear


def project(x: Tensor, router: Tensor, offset: Tensor | None) -> Tensor:
    """offset + x router^T, [N, n], in fp32 (fp64 for fp64 ``x``) whatever the precision of fp32 products is."""
    logits = exact_linear(x, router)
    return logits if offset is None else logits + offset.to(logits.dtype)


def route(
    logits: Tensor, top_k: int, normalize: bool, statistics: str | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `graphmoe_kernels.topk_softmax_routing` for the contract; arguments are validated there."""
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probabilities = torch.softmax(logits, dim=-1, dtype=accumulate)  # [N, n]
    chosen, experts = torch.topk(probabilities, top_k, dim=-1)  # [N, k] each
    weights = chosen / chosen.sum(dim=-1, keepdim=True) if normalize else chosen
    if statistics is None:
        return weights, experts, None, None

    counted = torch.ones_like(chosen)
    if token_mask is not None:  # by selection, not by a product: what padding holds may be NaN
        outside = ~token_mask.bool()[:, None]
        chosen, probabilities = chosen.masked_fill(outside, 0), probabilities.masked_fill(outside, 0)
        counted = counted.masked_fill(outside, 0)
    zeros = probabilities.new_zeros(probabilities.shape[-1])
    flat = experts.reshape(-1)
    counts = zeros.scatter_add(0, flat, counted.reshape(-1))  # [n]
    if statistics == "topk":
        mass = zeros.scatter_add(0, flat, chosen.reshape(-1))  # [n]
    else:
        mass = probabilities.sum(dim=0)  # [n]
    return weights, experts, counts, mass
