"""Finds what makes a GPU wait: tensors made from host data, and values read back to the host, by this package's code.

No GPU is needed: the calls are the same on the CPU, where they cost nothing. What Transformers, PEFT and the caller do
is theirs: a call counts if the innermost frame outside of PyTorch is one of this package's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

import graphmoe_kernels
import graphmoe_model

PACKAGES = tuple(str(Path(package.__file__).parent) for package in (graphmoe_kernels, graphmoe_model))
TORCH = str(Path(torch.__file__).parent)
# What runs in place of the Triton kernels on a CPU, where reading a tensor waits for nothing.
CPU_ONLY = (str(Path(graphmoe_kernels.__file__).parent / "experts" / "pytorch.py"),)

FROM_HOST = frozenset(
    [torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, Tensor.new_tensor]
)
TO_HOST = frozenset(
    [
        *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
        *(Tensor.__index__, Tensor.__contains__, Tensor.__len__, Tensor.__iter__, Tensor.__array__, Tensor.__repr__),
    ]
)
# Operators whose result's size, or whose result itself, is read from the device.
READ_BACK = frozenset(
    [
        *("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "bincount", "_unique2"),
        *("unique_dim", "unique_consecutive", "unique_dim_consecutive", "allclose", "histc", "linalg_matrix_rank"),
    ]
)
NO_READ = frozenset([Tensor.__len__, Tensor.__iter__])  # of the shape alone


def _owner() -> str | None:
    """File and line of this package that the current call comes from, or None if it comes from elsewhere."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((TORCH, "<")):
            ours = file.startswith(PACKAGES) and file not in CPU_ONLY
            return f"{file}:{frame.f_lineno}" if ours else None
        frame = frame.f_back
    return None


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func in FROM_HOST or func in TO_HOST - NO_READ) and (owner := _owner()) is not None:
            self.found.append(f"{owner}: {resolve_name(func) or func}")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads_back(func, args, kwargs or {}) and (owner := _owner()) is not None:
            self.found.append(f"{owner}: {func}")
        return func(*args, **(kwargs or {}))


def _reads_back(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = func._schema.name.partition("::")[2]
    if name in READ_BACK or name == "lift_fresh":
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # a mask is an index by its nonzero places
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("_to_copy", "copy_"):
        moved = [a.device.type for a in args if isinstance(a, Tensor)]
        return len({*moved, torch.device(kwargs.get("device") or moved[0]).type}) > 1
    return False


@contextmanager
def no_host_sync() -> Iterator[list[str]]:
    """Forbid both within the block, forward and backward; ``AssertionError`` at its end lists places and calls."""
    found: list[str] = []
    with _Calls(found), _Operators(found):
        yield found
    assert not found, "\n".join(dict.fromkeys(found))
