"""What follows from a call's sizes, dtype and device alone: grid, configuration and scratch, worked out once.

Plans are kept by all that they depend on, device class and number of multiprocessors included; what a launch's strides
and absent operands change is Triton's to look up.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from graphmoe_kernels import launching
from graphmoe_kernels.activations import triton_form
from graphmoe_kernels.backend import check_device, per_device
from graphmoe_kernels.experts.triton.sizes import SUMMED_AT_ONCE, WIDE_RANK_COLUMNS, Sizes, cut, program_slots
from graphmoe_kernels.launching import Config, class_config, power_of_two


class Target(NamedTuple):
    """What a device is to a plan."""

    device_class: str
    multiprocessors: int


class Plan(NamedTuple):
    """How one kernel is launched.

    Attributes:
        grid: tiles and splits, or the other way round as the kernel has them.
        constants: the kernel's constexprs by name, num_warps and num_stages.
        scratch: elements of fp32 that its programs share.
    """

    grid: tuple[int, int]
    constants: dict[str, Any]
    scratch: int

    @property
    def counters(self) -> int:
        """As many as its tiles count splits with, at most: see `reduce.reduce_splits`."""
        tiles, splits = self.grid
        return tiles * (1 + math.ceil(splits / SUMMED_AT_ONCE))


@per_device
def target(device: torch.device) -> Target:
    """What a device is to a plan; `ValueError` for one that Triton cannot run on."""
    check_device("a kernel's work", device)
    return Target(launching.device_class(device), launching.multiprocessors(device))


def config(kernel: str, size: Sizes, dtype: torch.dtype, device_class: str) -> Config:
    """The configuration of an experts' kernel.

    Of an F that is no multiple of 16 rows are not aligned, and loads take more registers: blocks are smaller.
    """
    narrow = "_unaligned" if size.width % 16 else ""
    name = f"experts_{kernel}" + ("_wide_rank" if size.columns > WIDE_RANK_COLUMNS else narrow)
    return class_config(name, size.tokens, dtype, device_class)


def constants(size: Sizes, activation: str, config: Config) -> dict[str, Any]:
    """The constexprs of the kernels that have experts."""
    return {"SLOTS": size.slots, "RANK": size.rank, "ACTIVATION": triton_form(activation), **config}


def tiles_and_splits(tokens: int, width: int, config: Config, multiprocessors: int) -> tuple[int, int]:
    """The tiles of the tokens, and into how many splits F is cut beside them."""
    tiles = math.ceil(tokens / config["BLOCK_M"])
    return tiles, cut(math.ceil(width / config["BLOCK_F"]), tiles, program_slots(config, multiprocessors))[0]


@per_device
def forward_plan(size: Sizes, activation: str, dtype: torch.dtype, device: torch.device) -> Plan:
    """The forward of few tokens: a program for each tile of them and block of F. Scratch: what blocks add to z."""
    chosen = config("forward", size, dtype, target(device).device_class)
    tiles, blocks = math.ceil(size.tokens / chosen["BLOCK_M"]), math.ceil(size.width / chosen["BLOCK_F"])
    fixed = constants(size, activation, chosen) | {"BLOCK_E": power_of_two(size.num_experts)}
    return Plan((tiles, blocks), fixed, blocks * size.tokens * size.columns)


@per_device
def token_plan(size: Sizes, activation: str, dtype: torch.dtype, device: torch.device) -> Plan:
    """The kernel of single tokens: a program for each and every block of F. Scratch: what blocks add to z."""
    chosen = config("forward_token", size, dtype, target(device).device_class)
    blocks = math.ceil(size.width / chosen["BLOCK_F"])
    return Plan((size.tokens, blocks), constants(size, activation, chosen), blocks * size.tokens * size.columns)


@per_device
def swiglu_plan(
    kernel: str, tokens: int, width: int, activation: str, dtype: torch.dtype, device: torch.device
) -> Plan:
    """Without experts."""
    device_class, multiprocessors = target(device)
    chosen = class_config(kernel, tokens, dtype, device_class)
    grid = tiles_and_splits(tokens, width, chosen, multiprocessors)
    return Plan(grid, {"ACTIVATION": triton_form(activation), **chosen}, 0)
