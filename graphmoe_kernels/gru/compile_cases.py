"""The variants of the GRU kernels that are compiled ahead of time: every configuration, and the flags that matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from graphmoe_kernels.aot.case import CompileCase

DTYPES = {"bf16": "half", "fp16": "half", "fp32": "float"}

Configs = Callable[[str, str, str], dict]


def compile_cases(configs: Configs) -> Iterator[CompileCase]:
    """Both kernels in later and first rounds; ``configs(kernel, size class, dtype class)`` gives the configuration.

    The width is a runtime argument, so no size stands here; as in every folded layer it is a multiple of 16.
    """
    for size in ("skinny", "wide"):
        for dtype, dtype_class in DTYPES.items():
            for later, tanh, train in (
                (True, False, True),
                (True, True, True),
                (True, False, False),
                (False, True, True),
            ):
                yield _forward(size, dtype, configs("gru_forward", size, dtype_class), later, tanh, train)
                yield _backward(size, dtype, configs("gru_backward", size, dtype_class), later, tanh, train)


def _forward(size: str, dtype: str, config: dict, later: bool, tanh: bool, train: bool) -> CompileCase:
    from graphmoe_kernels.gru.triton_kernels import gru_forward

    state = dict.fromkeys(("recurrent", "state", "total"), f"*{dtype}" if later else None)
    pointers = {"inputs": f"*{dtype}", **state, "weight": f"*{dtype}", "bias": "*fp32", "out": f"*{dtype}"}
    strides = ("width", "inputs_stride", "recurrent_stride", "state_stride", "total_stride", "weight_stride")
    flags = {"TANH": tanh, "HAS_STATE": later, "SAVE": train and later}
    return _case("gru_forward", gru_forward, size, dtype, config, pointers | {"candidate": "*fp32"}, strides, flags)


def _backward(size: str, dtype: str, config: dict, later: bool, tanh: bool, train: bool) -> CompileCase:
    from graphmoe_kernels.gru.triton_kernels import gru_backward

    state = dict.fromkeys(("recurrent", "state"), f"*{dtype}" if later else None)
    pointers = {"grad": f"*{dtype}", "inputs": f"*{dtype}", **state, "candidate": "*fp32", "weight": f"*{dtype}"}
    pointers |= {"bias": "*fp32", **dict.fromkeys(("d_inputs", "d_state", "reset_state"), f"*{dtype}")}
    strides = ("width", "grad_stride", "inputs_stride", "recurrent_stride", "state_stride", "weight_stride")
    flags = {"TANH": tanh, "HAS_STATE": later, "RESET_STATE": train and later, "BIAS": train}
    return _case("gru_backward", gru_backward, size, dtype, config, pointers | {"d_bias": "*fp32"}, strides, flags)


def _case(
    name: str,
    kernel: object,
    size: str,
    dtype: str,
    config: dict,
    pointers: dict[str, str | None],
    divisible: tuple[str, ...],
    flags: dict[str, bool],
) -> CompileCase:
    """A case; a pointer without a type is the constant None, as in the first round."""
    signature = {pointer: kind for pointer, kind in pointers.items() if kind is not None}
    constexprs: dict[str, object] = {pointer: None for pointer, kind in pointers.items() if kind is None}
    constexprs |= flags | {key: value for key, value in config.items() if key.startswith("BLOCK_")}
    asked = " ".join(flag for flag, value in flags.items() if value)
    return CompileCase(
        name=f"gru {name} {size} {dtype} {asked}".rstrip(),
        kernel=kernel,
        signature=signature | dict.fromkeys(("tokens", *divisible), "i32"),
        constexprs=constexprs,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        matrix=size == "wide" and dtype != "fp32" and flags["HAS_STATE"],
        divisible_by_16=divisible,
    )
