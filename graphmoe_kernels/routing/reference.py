"""Top-k softmax routing and its statistics, in plain PyTorch.

Routing here is the oracle and the CPU path at once: a softmax over a few experts is a handful of small, fast calls. The
statistics are those of every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_softmax(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return routing weights and expert ids [N, k] of fp32 or fp64 ``logits`` [N, n] (GraphMoE, Eq. 4)."""
    probabilities = torch.softmax(logits, dim=-1)  # [N, n]
    # The softmax of the chosen logits is two calls fewer, but does not sum to 1 as exactly: up to a quarter more error
    # in the gradients of routers.
    chosen, expert_ids = torch.topk(probabilities, top_k, dim=-1)  # [N, k] each
    return chosen / chosen.sum(dim=-1, keepdim=True) if normalize else chosen, expert_ids


def count(logits: Tensor, expert_ids: Tensor, statistics: str, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `Routing.tokens_per_expert` and `Routing.probability_sums`, [n] each (GraphMoE, Eq. 8).

    Padding is left out by selection, not by a product, and before the softmax: it may hold NaN. Sums over the tokens
    run in a fixed order, without atomics.
    """
    taken = torch.zeros_like(logits).scatter(1, expert_ids.long(), 1.0)  # [N, n]
    counted = torch.ones_like(taken)
    if token_mask is not None:
        padding = ~token_mask.bool()[:, None]
        logits, taken, counted = (t.masked_fill(padding, 0) for t in (logits, taken, counted))
    summed = taken if statistics == "topk" else counted
    probabilities = torch.softmax(logits, dim=-1).masked_fill(summed == 0, 0)
    return taken.sum(dim=0), probabilities.sum(dim=0)
