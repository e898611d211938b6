"""Several processes of a group in one: each runs in turn, twice, and the second time gets what an all-reduce gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

T = TypeVar("T")


def over_processes(runs: Sequence[Callable[[], T]]) -> tuple[list[T], int]:
    """Run each process's function; their results, and the number of collectives, the same for all.

    A run must not depend on what was summed in ways that change what it sums later.
    """
    sent: list[list[Tensor]] = []

    def collect(tensor: Tensor) -> None:
        sent[-1].append(tensor.clone())

    with _group(len(runs), collect):
        for run in runs:
            sent.append([])
            run()
    assert len({len(own) for own in sent}) == 1, "a process would wait for ever"
    results = []
    for run in runs:
        totals = iter([torch.stack(calls).sum(0) for calls in zip(*sent, strict=True)])
        with _group(len(runs), lambda tensor, totals=totals: tensor.copy_(next(totals))):
            results.append(run())
    return results, len(sent[0])


def _group(size: int, all_reduce: Callable[[Tensor], object]) -> Any:
    return mock.patch.multiple(
        "torch.distributed", is_initialized=lambda: True, get_world_size=lambda: size, all_reduce=all_reduce
    )
