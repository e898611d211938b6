"""Running out of memory, said in terms of what was asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def memory_error(what: str, advice: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors of either device into a ``MemoryError`` that says how much was missing."""
    try:
        yield
    except RuntimeError as error:
        asked = re.search(r"[Tt]ried to allocate ([\d.]+) ?(\w+)", str(error))
        if asked is None:
            raise
        amount = f"{float(asked[1]) / 2**30:.2f} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        raise MemoryError(f"out of memory: {what} needed {amount} more than there is; {advice}") from error


def check_fits(parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose parameters cannot fit; systems kill a process that finds out by itself.

    On a CPU the bound is the whole machine's memory, where the system tells it.

    Raises:
        MemoryError: says how much they take and how much there is.
    """
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    needed = parameters * dtype.itemsize
    if needed > there:
        raise MemoryError(
            f"the model takes {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, {device} has "
            f"{there / 2**30:.1f} GiB; ask for fewer layers or a smaller dtype"
        )
