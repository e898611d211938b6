"""The experts' ids as the host reads them: counted and checked in one go."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TWICE = "expert_ids must be distinct within a row: a token chooses an expert once, got some id twice"


def expert_bounds(ordered: Tensor, chosen: Tensor, num_experts: int) -> list[int]:
    """Where each expert's pairs begin among the sorted ones, and where the last one's end: n + 1 numbers.

    The one read of the ids by the host is also what checks them.

    Args:
        ordered: [p] the ids in ascending order.
        chosen: [b, k] the ids by token.
        num_experts: n.

    Raises:
        ValueError: an id outside of 0..n-1, or one that stands twice in a row.
    """
    marks = torch.arange(num_experts + 1, device=ordered.device)
    found, slots, distinct = torch.searchsorted(ordered.long(), marks), chosen.shape[1], 1
    if slots > 1:
        rows = chosen.long() if slots == 2 else chosen.long().sort(dim=1).values
        no_step_is_0 = rows.diff(dim=1).all()
        *bounds, distinct = torch.cat([found, no_step_is_0.long()[None]]).tolist()  # one transfer from a GPU
    else:
        bounds = found.tolist()
    if bounds[0] > 0 or bounds[-1] < len(ordered):
        raise _outside(int(ordered[0]), int(ordered[-1]), num_experts)
    if not distinct:
        raise ValueError(TWICE)
    return bounds


def read_ids(chosen: Tensor, num_experts: int) -> list[list[int]]:
    """Return the ids [b, k] of a few tokens as the host reads them; raise the errors of `expert_bounds`."""
    rows: list[list[int]] = chosen.tolist()
    for row in rows:
        ids = set(row)
        if not ids <= _all_ids(num_experts):
            raise _outside(int(chosen.min()), int(chosen.max()), num_experts)
        if len(ids) < len(row):
            raise ValueError(TWICE)
    return rows


@functools.cache
def _all_ids(num_experts: int) -> frozenset[int]:
    return frozenset(range(num_experts))


def _outside(least: int, most: int, num_experts: int) -> ValueError:
    return ValueError(f"expert_ids must be in 0..{num_experts - 1} (there are {num_experts}), got {least} to {most}")
