"""The experts' ids: what is refused where the host reads them, and marked where it does not."""

from __future__ import annotations

import functools

from torch import Tensor

TWICE = "expert_ids must be distinct within a row: a token chooses an expert once, got some id twice"


def check_ids(chosen: Tensor, num_experts: int) -> None:
    """`ValueError` for ids [N, k], on the CPU, outside of 0..n-1, or for one that stands twice in a row."""
    if chosen.numel() == 0:
        return
    least, most = (int(x) for x in chosen.aminmax())
    if least < 0 or most >= num_experts:
        raise _outside(least, most, num_experts)
    if not _distinct(chosen).all():
        raise ValueError(TWICE)


def valid_tokens(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Tell, without reading them, for which tokens `check_ids` finds nothing, [N], and give ids [N, k] that are all
    within 0..n-1."""
    chosen = chosen.long()
    within = chosen.clamp(0, num_experts - 1)
    return (within == chosen).all(1) & _distinct(chosen), within


def _distinct(chosen: Tensor) -> Tensor:
    """Whether no id stands twice in a row of ids [N, k]: [N]."""
    slots = chosen.shape[1]
    if slots == 2:
        return chosen[:, 0] != chosen[:, 1]
    return (chosen.long().sort(1).values.diff(dim=1) > 0).all(1)


def read_ids(chosen: Tensor, num_experts: int) -> list[list[int]]:
    """Return the ids [b, k] of a few tokens as the host reads them; raise the errors of `check_ids`."""
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
