"""Functions for test_launch.py: one that works, one that raises on a rank, one that a rank does not come to."""

from __future__ import annotations

import torch
from torch import distributed


def add_up(number: int) -> int:
    """The sum over the ranks of ``number`` and the rank."""
    total = torch.tensor(number + distributed.get_rank())
    distributed.all_reduce(total)
    return int(total)


def raise_on_one_rank() -> None:
    """Rank 1 raises while rank 0 waits for it."""
    if distributed.get_rank() == 1:
        raise ValueError("rank 1 is out of sorts")
    distributed.barrier()


def miss_a_collective() -> None:
    """Rank 1 waits for itself alone, as ranks do whose collectives differ."""
    group = distributed.new_group([0, 1])
    if distributed.get_rank() == 0:
        distributed.barrier(group)
    else:
        distributed.recv(torch.zeros(1), src=0)
