"""Prompts as batches for one forward each, and the forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def batches(prompts: Sequence[Sequence[int]], batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches of token ids in the prompts' order, padded at their end, with the mask that says so.

    Args:
        prompts: the ids of each, at least one.
        batch_size: prompts per batch.
        device: where the batches are.
    """
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)  # a masked token may be any
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        yield {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def read_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run a causal language model once over each prompt, for what hooks and collectors see of it.

    Args:
        model: with or without an adapter; it is set to evaluation mode.
        prompts: token ids of each.
        batch_size: prompts per forward.
        progress: is told how many of how many prompts are done.
    """
    model.eval()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in known:
        options["logits_to_keep"] = 1  # nobody reads them
    device, done = next(model.parameters()).device, 0
    for batch in batches(prompts, batch_size, device):
        model(**batch, **options)
        done += len(batch["input_ids"])
        if progress is not None:
            progress(done, len(prompts))
