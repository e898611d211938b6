"""Routing as it runs on PyTorch: in few calls, which are what few tokens wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_softmax(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return routing weights and expert ids [N, k] of fp32 or fp64 ``logits`` [N, n] (GraphMoE, Eq. 4)."""
    if normalize:  # the chosen probabilities over their sum are the softmax of the chosen logits
        chosen, expert_ids = torch.topk(logits, top_k)  # [N, k] each
        return torch.softmax(chosen, 1), expert_ids
    routing_weights, expert_ids = torch.topk(torch.softmax(logits, 1), top_k)
    return routing_weights, expert_ids
