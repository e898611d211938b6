"""What the operators' arguments have in common: they are tensors of floats, on one device, and plain numbers.

Every check reads what the host knows of a tensor (type, layout, dtype, shape, device), never its values, so none waits
for a GPU; each takes a fraction of a microsecond.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
STRIDED = torch.strided  # a name of this module is read in a third of the time
Shape = tuple[int, ...]
INTEGER_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def check_tensor(name: str, value: object) -> None:
    """`TypeError` for what is no tensor, or none whose elements lie at strides (sparse, nested)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one")
    if value.layout is not STRIDED:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; pass {name}.to_dense()")


def check_floats(name: str, value: object) -> None:
    """`TypeError` for what is no dense tensor of fp64, fp32, fp16 or bf16: the dtypes that are computed in."""
    if isinstance(value, Tensor) and value.layout is STRIDED and value.dtype in FLOAT_DTYPES:
        return
    check_tensor(name, value)
    dtype = value.dtype  # type: ignore[attr-defined]
    raise TypeError(
        f"{name} must be floating point, got {dtype}; float64, float32, float16 and bfloat16 are computed in"
    )


def check_integers(name: str, value: object) -> None:
    """`TypeError` for what is no dense tensor of integers."""
    check_tensor(name, value)
    if value.dtype not in INTEGER_DTYPES:  # type: ignore[attr-defined]
        dtype = value.dtype  # type: ignore[attr-defined]
        raise TypeError(f"{name} must be integers (int64, int32, int16, int8 or uint8), got {dtype}")


def check_shapes(
    prefix: str,
    fields: Sequence[str],
    tensors: Sequence[Any],
    shapes: Sequence[Shape | None],
    told: Callable[[], str],
    main: tuple[str, Tensor],
    *,
    integers: bool = False,
) -> None:
    """`TypeError` or `ValueError` for tensors of other dtypes or shapes, or that are not where the main one is.

    Args:
        prefix, fields: the names of the tensors; the prefix is that of a group's, such as ``"update."``.
        tensors, shapes: in their order; what has no shape may be missing and is not looked at.
        told: what the shapes follow from, for a message. Asked where there is an error: a number that stands in a text
            is a constant of a compiled graph.
        main: the main tensor's name, and the tensor.
        integers: of integers in place of floats.
    """
    device, dtypes = main[1].device, INTEGER_DTYPES if integers else FLOAT_DTYPES
    for field, tensor, shape in zip(fields, tensors, shapes, strict=True):
        if shape is None:
            continue
        fits = isinstance(tensor, Tensor) and tensor.shape == shape and tensor.device == device
        if fits and tensor.dtype in dtypes and tensor.layout is STRIDED:
            continue
        name = prefix + field
        (check_integers if integers else check_floats)(name, tensor)
        check_device(name, tensor, *main)
        raise ValueError(f"{name} must be {list(shape)} for {told()}; got {list(tensor.shape)}")


def agreed(*sizes: tuple[object, int]) -> int:
    """Return the size in which two of these tensors agree, else the first's: one wrong tensor is then itself named.

    Args:
        sizes: a tensor and the dimension that has the size; what is no tensor, or lacks the dimension, says nothing.
    """
    seen: list[int] = []
    for value, dimension in sizes:
        if isinstance(value, Tensor) and value.dim() > dimension:
            size = value.shape[dimension]
            if size in seen:
                return size
            seen.append(size)
    return seen[0] if seen else 0


def check_device(name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    """`ValueError` for a tensor that is not where the main one is."""
    if tensor.device != main.device:
        raise ValueError(f"{name} is on {tensor.device}, {main_name} on {main.device}; put them on one device")


def check_type(name: str, value: object, kind: type, optional: bool = False) -> None:
    """`TypeError` for what is not of a kind, nor None where that may be."""
    if not isinstance(value, kind) and not (optional and value is None):
        expected = f"{kind.__name__} or None" if optional else kind.__name__
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    """`ValueError` for what is none of the words (or None) that a setting can be."""
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"unknown {name} {shown(value)}; expected one of {', '.join(map(repr, choices))}")


def check_flag(name: str, value: object) -> None:
    """`TypeError` for what is neither True nor False: a word or a number would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_count(name: str, value: object) -> None:
    """`TypeError` for what is no whole number; True is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")


def check_positive(name: str, value: object) -> None:
    """`TypeError` for what is no whole number, `ValueError` for one below 1."""
    check_count(name, value)
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least 1, got {shown(value)}")


def check_number(name: str, value: object) -> None:
    """`TypeError` for what is no number, `ValueError` for one that is not finite or too large for a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    # By comparisons, which a graph with symbolic numbers has too; an integer beyond the floats is not within them.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")


def shown(value: object, most: int = 80) -> str:
    """A wrong value for a message: its ``repr``, cut where it is long (Python has none of very long integers)."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def check_dropout(value: object, name: str = "dropout") -> None:
    """`TypeError` or `ValueError` for what is no probability below 1."""
    check_number(name, value)
    if not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must lie in [0, 1), got {shown(value)}")


def check_top_k(top_k: object, num_experts: int) -> None:
    """`TypeError` or `ValueError` for a ``top_k`` that no token can choose among so many experts."""
    check_count("top_k", top_k)
    if num_experts < 1:
        raise ValueError("there are no experts: the router (or the logits) must have at least one")
    if not 1 <= top_k <= num_experts:  # type: ignore[operator]
        raise ValueError(f"top_k must lie in 1..{num_experts} (the number of experts), got {shown(top_k)}")
