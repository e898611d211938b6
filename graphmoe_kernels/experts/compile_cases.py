"""What the compile inspector compiles of the expert kernels: what a Llama-3-8B layer runs, and odd ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from graphmoe_kernels.aot.case import CompileCase
from graphmoe_kernels.experts.stream import PLACED_BLOCKS, PLACING, SUMMING, tile
from graphmoe_kernels.experts.triton_backward_tokens import backward_tokens_kernel
from graphmoe_kernels.experts.triton_backward_weights import backward_weights_kernel
from graphmoe_kernels.experts.triton_forward import forward_kernel
from graphmoe_kernels.experts.triton_stream import stream_kernel, stream_sum_kernel
from graphmoe_kernels.experts.triton_tuples import count_tuples, place_tokens
from graphmoe_kernels.launching import DTYPE_CLASSES, SIZE_CLASSES, power_of_two

KERNELS = {
    "forward": forward_kernel,
    "backward_tokens": backward_tokens_kernel,
    "backward_weights": backward_weights_kernel,
}
# The steps of a stream: those beside the kernel itself have one configuration, of one tile for every device.
STREAM_KERNELS = {
    "stream": stream_kernel,
    "stream sum": stream_sum_kernel,
    "count tuples": count_tuples,
    "place tokens": place_tokens,
}
DTYPES = {"half": ("bf16", "fp16"), "float": ("fp32",)}
# Arguments of the activations' dtype; all other pointers are fp32 sums or indices.
IN_DTYPE = (
    *("gate", "up", "state", "fold_gate", "fold_up", "low", "low_update", "gate_B", "up_B", "down_A"),
    *("added_gate", "added_up", "gate_bias", "up_bias", "c", "z", "d_c", "d_z", "d_gate", "d_up", "d_low"),
)
FP32 = (
    *("weights", "gate_scale", "up_scale", "partial", "partial_gate", "partial_up", "partial_weights", "d_weights"),
    *("d_gate_B", "d_up_B", "d_down_A", "d_gate_scale", "d_up_scale"),
)
INTEGERS = {"experts": "*i32", "order": "*i32", "counts": "*i32", "present": "*i32", "tickets": "*i32", "seed": "*i64"}
STRIDES = (
    *("width", "inner", "stride_gate", "stride_up", "stride_state", "stride_added", "stride_low", "stride_update"),
    "split_width",
)
SCALARS = {"scale": "fp32", "kept": "fp32"}


class Variant(NamedTuple):
    """What a layer switches on: each of them compiles other code."""

    name: str
    later: bool = True
    dropout: bool = False
    scales: bool = False
    biases: bool = False
    order: bool = True
    slots: int = 2
    rank: int = 16

    @property
    def updated(self) -> bool:
        """Whether a later round adds to the low-rank activations: not if they are made anew or there are none."""
        return self.later and not self.dropout and self.rank > 0

    def absent(self) -> list[str]:
        """Pointers that a launch of this variant passes None for."""
        found = [] if self.later else ["state", "fold_gate", "fold_up", "added_gate", "added_up"]
        found += [] if self.updated else ["low_update"]
        found += [] if self.scales else ["gate_scale", "up_scale", "d_gate_scale", "d_up_scale"]
        found += [] if self.biases else ["gate_bias", "up_bias"]
        return found + ([] if self.dropout else ["seed"]) + ([] if self.order else ["order"])


VARIANTS = {
    "wide": (
        Variant("first round", later=False),
        Variant("later round"),
        Variant("later round, dropout", dropout=True),
        Variant("scale vectors and biases", later=False, scales=True, biases=True),
        Variant("scale vectors, later round", scales=True),
        Variant("rank 0, mixed experts", slots=1, rank=0, order=False),
    ),
    "skinny": (
        Variant("first round", later=False, order=False),
        Variant("later round", order=False),
        Variant("rank 0, mixed experts", slots=1, rank=0, order=False),
    ),
}
STREAM_VARIANTS = (
    *VARIANTS["wide"][:-1],
    Variant("scale vectors and biases, one slot, dropout", scales=True, biases=True, dropout=True, slots=1),
)
WIDE_RANK = (Variant("rank 80, LoRA", slots=1, rank=80, order=False), Variant("k = 8", slots=8))


def compile_cases(configs: Callable[[str, str, str], dict[str, int]]) -> Iterator[CompileCase]:
    """Every kernel, size class and dtype with its variants; ``configs`` gives the configuration of the first three."""

    def config(kernel: str, size: str, dtype_class: str) -> dict[str, int]:
        found = dict(configs(kernel, size, dtype_class))
        if kernel.startswith("backward_weights"):  # as the launch does: one tile for both backward kernels
            found["BLOCK_M"] = configs(kernel.replace("weights", "tokens"), size, dtype_class)["BLOCK_M"]
        return found

    for kernel in KERNELS:
        for size in SIZE_CLASSES:
            for dtype_class in DTYPE_CLASSES:
                for dtype in DTYPES[dtype_class]:
                    for variant in VARIANTS[size]:
                        if kernel == "backward_weights" and variant.rank == 0:
                            continue  # there are none
                        yield _case(kernel, size, dtype, variant, config(kernel, size, dtype_class))
                    for variant in WIDE_RANK if dtype != "fp16" else ():
                        yield _case(kernel, size, dtype, variant, config(f"{kernel}_wide_rank", size, dtype_class))
    for dtype in DTYPES["half"]:
        for variant in STREAM_VARIANTS:
            yield _case("stream", "wide", dtype, variant, tile(config("stream", "wide", "half"), variant.dropout))
    beside = {"BLOCK_B": PLACED_BLOCKS, "BLOCK_M": config("stream", "wide", "half")["BLOCK_M"], "num_stages": 3}
    for kernel in ("count tuples", "place tokens"):
        for keys in (32, 256):
            yield _case(kernel, "wide", "bf16", Variant(f"{keys} keys"), beside | PLACING | {"KEYS": keys})
    yield _case("stream sum", "wide", "bf16", Variant("k = 2"), beside | SUMMING)


def _case(kernel: str, size: str, dtype: str, variant: Variant, config: dict[str, int]) -> CompileCase:
    function = (KERNELS | STREAM_KERNELS)[kernel]
    blocks = {name: value for name, value in config.items() if name.isupper()}
    padded = power_of_two(max(16, variant.rank))
    constexprs: dict[str, object] = {
        "SLOTS": variant.slots,
        "RANK": variant.rank,
        "RANK_PADDED": padded,
        "COLUMNS": max(16, variant.slots * padded),
        "SLOTS_PADDED": max(2, variant.slots),
        "ACTIVATION": "silu",
        "APPROXIMATE": True,
        "HAS_STATE": variant.later,
        "HAS_UPDATE": variant.updated,
        "HAS_SCALE": variant.scales,
        "HAS_BIAS": variant.biases,
        "HAS_ORDER": variant.order,
        "DROPOUT": variant.dropout,
        **blocks,
        **dict.fromkeys(variant.absent()),
    }
    constexprs = {name: value for name, value in constexprs.items() if name in function.arg_names}
    runtime = [name for name in function.arg_names if name not in constexprs]
    return CompileCase(
        name=f"experts {kernel} {size} {dtype}, {variant.name}",
        kernel=function,
        signature={name: _type(name, dtype) for name in runtime},
        constexprs=constexprs,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        matrix=kernel in KERNELS and size == "wide" and dtype != "fp32",  # a stream's tiles are of a warp, not four
        divisible_by_16=tuple(name for name in STRIDES if name in runtime),
    )


def _type(name: str, dtype: str) -> str:
    if name in IN_DTYPE:
        return f"*{dtype}"
    if name in FP32:
        return "*fp32"
    return INTEGERS.get(name) or SCALARS.get(name, "i32")
