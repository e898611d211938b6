"""What a call of the expert SwiGLU round gives its Triton kernels: sizes, layouts, and how work is cut."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.experts.dropout import kept_scale, threshold
from graphmoe_kernels.experts.operands import Inputs, Settings
from graphmoe_kernels.launching import Config, by_rows, kernel_config, multiprocessors, power_of_two

# Columns of the compact low-rank rows (slots times padded rank) that a program can hold beside its tile.
MAX_COLUMNS = 256
# From so many columns on, a program's tile is smaller: the configurations named "..._wide_rank".
WIDE_RANK_COLUMNS = 64
# Warps of these kernels that a multiprocessor holds: they use all registers that a thread can have.
WARPS_PER_MULTIPROCESSOR = 8


def _padded(size: int) -> int:
    """The power of two that holds ``size``, at least 16: what a matrix instruction takes."""
    return max(16, power_of_two(size))


class Sizes(NamedTuple):
    """The sizes that the kernels are compiled for or called with."""

    tokens: int
    width: int
    num_experts: int
    rank: int
    slots: int

    @property
    def rank_padded(self) -> int:
        """A rank's columns in a matrix instruction."""
        return _padded(self.rank)

    @property
    def slots_padded(self) -> int:
        """The power of two that holds the slots, at least 2."""
        return max(2, power_of_two(self.slots))

    @property
    def columns(self) -> int:
        """Columns of compact rows: every slot's padded rank."""
        return _padded(self.slots * self.rank_padded)


def sizes(inputs: Inputs) -> Sizes:
    """The sizes of a call."""
    n, r, width = inputs.down_A.shape
    return Sizes(inputs.gate.shape[0], width, n, r, inputs.experts.shape[1])


def check_supported(inputs: Inputs, activation: str) -> None:
    """`ValueError` for what the kernels do not take, naming the argument and what works."""
    from graphmoe_kernels.triton_activations import NAMES

    size = sizes(inputs)
    if activation not in NAMES:
        raise ValueError(
            f"activation {activation!r} has no Triton form (there are {', '.join(NAMES)}); use backend='torch'"
        )
    if size.columns > MAX_COLUMNS:
        raise ValueError(
            f"k={size.slots} experts a token of rank {size.rank} (padded to {size.rank_padded}) need {size.columns} "
            f"columns, and the Triton kernels hold up to {MAX_COLUMNS}; lower top_k or r, or use backend='torch'"
        )
    inner = 0 if inputs.state is None else inputs.state.shape[1]
    if size.width * max(inner, size.rank) >= 2**31:
        raise ValueError(f"F={size.width} times G={inner} or r={size.rank} exceeds 2^31; use backend='torch'")


@functools.lru_cache(maxsize=4096)
def cut(work: int, others: int, slots: int) -> tuple[int, int]:
    """Into how many splits to cut ``work`` pieces beside ``others`` programs, and the pieces of one.

    ``slots`` programs run at once. The time is that of the waves times a program's pieces and half a piece for its
    beginning and end.
    """
    work = max(work, 1)
    pieces = min(range(1, work + 1), key=lambda p: math.ceil(others * math.ceil(work / p) / slots) * (p + 0.5))
    return math.ceil(work / pieces), pieces


def program_slots(config: Config, multiprocessors: int) -> int:
    """How many programs run at once: registers hold eight warps of these kernels on a multiprocessor."""
    return multiprocessors * max(1, WARPS_PER_MULTIPROCESSOR // config["num_warps"])


class Call(NamedTuple):
    """The arguments that the kernels share."""

    size: Sizes
    inputs: Inputs
    settings: Settings
    arguments: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.inputs.gate.device

    def splits(self, config: Config, tiles: int) -> tuple[int, int]:
        """Into how many splits F is cut beside ``tiles`` programs, and the columns of one."""
        blocks = math.ceil(self.size.width / config["BLOCK_F"])
        splits, each = cut(blocks, tiles, program_slots(config, multiprocessors(self.device)))
        return splits, each * config["BLOCK_F"]

    def config(self, kernel: str) -> Config:
        """The configuration of a kernel for this call."""
        name = kernel + ("_wide_rank" if self.size.columns > WIDE_RANK_COLUMNS else "")
        return kernel_config("experts", name, self.size.tokens, self.inputs.gate.dtype, self.device)


def prepare(inputs: Inputs, settings: Settings) -> Call:
    """Layouts that the kernels can read, and the arguments that follow from sizes and settings."""
    size = sizes(inputs)
    by_row = ("gate", "up", "state", "low", "low_update")
    inputs = inputs.map(lambda name, x: by_rows(x) if name in by_row else x.contiguous())
    state, low_update = inputs.state, inputs.low_update
    dropping = settings.dropout > 0 and settings.seed is not None
    arguments = {
        **inputs._asdict(),
        "gate_bias": None if settings.gate_bias is None else settings.gate_bias.contiguous(),
        "up_bias": None if settings.up_bias is None else settings.up_bias.contiguous(),
        "order": settings.order,
        "seed": settings.seed if dropping else None,
        "tokens": size.tokens,
        "width": size.width,
        "inner": 0 if state is None else state.shape[1],
        "num_experts": size.num_experts,
        "stride_gate": inputs.gate.stride(0),
        "stride_up": inputs.up.stride(0),
        "stride_state": 0 if state is None else state.stride(0),
        "stride_low": inputs.low.stride(0),
        "stride_update": 0 if low_update is None else low_update.stride(0),
        "scale": settings.scale,
        "threshold": threshold(settings.dropout),
        "kept": kept_scale(settings.dropout),
        "SLOTS": size.slots,
        "SLOTS_PADDED": size.slots_padded,
        "RANK": size.rank,
        "RANK_PADDED": size.rank_padded,
        "ACTIVATION": settings.activation,
        "HAS_STATE": state is not None,
        "HAS_UPDATE": low_update is not None,
        "HAS_SCALE": inputs.gate_scale is not None,
        "HAS_BIAS": settings.gate_bias is not None,
        "HAS_ORDER": settings.order is not None,
        "DROPOUT": dropping,
    }
    return Call(size, inputs, settings, arguments)


def scratch(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory where ``x`` is."""
    return torch.empty(shape, dtype=dtype, device=x.device)
