"""What an operator offers the compile inspector, and the cases that are made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.launching import SKINNY_TOKENS, Launch

# What operators are compiled for: dtypes, and token counts of both size classes.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {"skinny": SKINNY_TOKENS, "wide": 8192}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a tensor without memory: what a launch is compiled for is known of it."""
    return torch.empty(*shape, dtype=dtype, device="meta")


class Variant(NamedTuple):
    """A call of an operator's host code, for the launches that it makes.

    Attributes:
        name: what is particular about it: sizes, dtypes, what a layer switches on.
        call: runs the host code on meta tensors.
        matrix: the kernels whose code for sm_90 has to use warp-group matrix instructions (HGMMA).
    """

    name: str
    call: Callable[[], object]
    matrix: tuple[str, ...] = ()


class CompileCase(NamedTuple):
    """A launch whose kernel is compiled as the launch would have it compiled.

    Attributes:
        name: kernel and variant, as the inspector's table prints it.
        launch: the launch, on tensors without memory.
        matrix: whether the code for sm_90 has to use warp-group matrix instructions (HGMMA).
    """

    name: str
    launch: Launch
    matrix: bool


def configuration(case: CompileCase) -> str:
    """The constants, warps and stages of a case in a line."""
    options = case.launch.options
    constants = [f"{name}={_shown(value)}" for name, value in case.launch.constants.items()]
    return " ".join([*constants, f"warps={options['num_warps']}", f"stages={options.get('num_stages', 'default')}"])


def _shown(value: Any) -> str:
    """A constant; a function by its name."""
    if isinstance(value, tuple):
        return "+".join(map(_shown, value))
    return getattr(value, "__name__", str(value))


def specialization(launch: Launch) -> tuple[Any, ...]:
    """Return what tells the launch's compiled kernel from others: two launches that agree in it share one.

    Of a tensor its dtype and whether it is aligned to 16 bytes; of an integer whether it is 1 or divisible by 16,
    unless the kernel leaves it free; constants, None, warps and stages as they are.
    """
    free = {p.name for p in getattr(launch.kernel, "params", ()) if p.do_not_specialize}

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, tuple) and not name.isupper():
            return tuple(kind(name, each) for each in value)
        if isinstance(value, int) and not name.isupper():
            return "int" if name in free else (value == 1, value % 16 == 0)
        return "float" if isinstance(value, float) and not name.isupper() else value

    found = {name: kind(name, value) for name, value in launch.arguments.items()}
    return launch.name, *found.items(), *launch.options.items()


def fingerprint(launch: Launch) -> str:
    """Return `specialization` in a few letters, the same in every process."""
    return hashlib.sha256(_written(specialization(launch)).encode()).hexdigest()[:16]


def _written(value: Any) -> str:
    return f"({', '.join(map(_written, value))})" if isinstance(value, tuple) else _shown(value)
