"""What the operators' arguments have in common: they are tensors of floats, on one device, and plain numbers.

Every check reads what the host knows of a tensor (type, layout, dtype, shape, device), never its values, so none waits
for a GPU; each takes a fraction of a microsecond.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
STRIDED = torch.strided  # a name of this module is read in a third of the time
INTEGER_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


def check_tensor(name: str, value: object) -> None:
    """`TypeError` for what is no tensor, or none whose elements lie at strides (sparse, nested)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one")
    if value.layout is not STRIDED:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; pass {name}.to_dense()")


def check_floats(name: str, value: object) -> None:
    """`TypeError` for what is no dense tensor of fp64, fp32, fp16 or bf16: the dtypes that are computed in."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:  # type: ignore[attr-defined]
        raise TypeError(
            f"{name} must be floating point, got {value.dtype}; float64, float32, float16 and bfloat16 are "  # type: ignore[attr-defined]
            "computed in"
        )


def check_device(name: str, tensor: Tensor, main_name: str, main: Tensor) -> None:
    """`ValueError` for a tensor that is not where the main one is."""
    if tensor.device != main.device:
        raise ValueError(f"{name} is on {tensor.device}, {main_name} on {main.device}; put them on one device")


def check_flag(name: str, value: object) -> None:
    """`TypeError` for what is neither True nor False: a word or a number would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_count(name: str, value: object) -> None:
    """`TypeError` for what is no whole number; True is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")


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
