"""Named tuples of tensors, some of them in tuples of their own, some missing: what is done with every tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def tensors_in(part: Any) -> list[Tensor]:
    """List the tensors of a part in the order of its fields, those of the named tuples in it included."""
    if isinstance(part, Tensor):
        return [part]
    return [tensor for each in part for tensor in tensors_in(each)] if isinstance(part, tuple) else []


def map_tensors(function: Callable[[Tensor], Tensor], part: Part) -> Part:
    """Apply a function to every tensor of a part (a tensor, None or a tuple, named or not); what is no tensor stays."""
    made: Any = part
    if isinstance(part, Tensor):
        made = function(part)
    elif isinstance(part, tuple):
        fields = [map_tensors(function, each) for each in part]
        made = type(part)(*fields) if hasattr(part, "_fields") else tuple(fields)
    return made


def cast(part: Part, dtype: torch.dtype, copy: bool = False) -> Part:
    """Cast every tensor of a part; with ``copy`` nothing is shared with it."""

    return map_tensors(lambda tensor: tensor.to(dtype, copy=True) if copy else cast_tensor(tensor, dtype), part)


def cast_tensor(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast one tensor; asked first, as a ``to`` that does nothing takes ten times as long."""
    return x if x.dtype is dtype else x.to(dtype)
