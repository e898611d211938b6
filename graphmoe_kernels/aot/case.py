"""One kernel, one dtype, one configuration: what an operator offers the compile inspector."""

from __future__ import annotations

from typing import NamedTuple


class CompileCase(NamedTuple):
    """A kernel with everything the compiler has to know about a launch.

    Attributes:
        name: operator, kernel, size class and dtype, as the inspector's table prints it.
        kernel: the ``@triton.jit`` function.
        signature: the type of each runtime argument by its name: ``"*bf16"``, ``"*i32"``, ``"i32"``, ``"fp32"``.
        constexprs: the value of each ``tl.constexpr`` argument by its name.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        matrix: whether the code for sm_90 has to use warp-group matrix instructions (HGMMA).
        divisible_by_16: the integer arguments that a launch always finds divisible by 16. Pointers always are.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    matrix: bool
    divisible_by_16: tuple[str, ...] = ()


def configuration(case: CompileCase) -> str:
    """The constexprs, warps and stages of a case in a line."""
    constexprs = [f"{name}={value}" for name, value in case.constexprs.items()]
    return " ".join([*constexprs, f"warps={case.num_warps}", f"stages={case.num_stages}"])
