"""How a Triton kernel is launched: its configuration by device, batch size and dtype, and the launch itself.

Nothing is tuned at first call. ``configs/<device class>/<operator>.json`` holds one configuration for every kernel of
an operator, size class and dtype class; `make tune` rewrites it on a GPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphmoe_kernels.backend import check_device, device_capability, interpreting

CONFIGS = Path(__file__).parent / "configs"
DEVICE_CLASSES = ("sm_80", "sm_90", "sm_100", "gfx942")

# Up to so many tokens (decode) a kernel takes the "skinny" configuration made for it.
SKINNY_TOKENS = 64
# A matrix instruction takes 16 rows: no tile of tokens is smaller, and one counter is made for each 16.
SMALLEST_TILE = 16
SIZE_CLASSES = ("skinny", "wide")
DTYPE_CLASSES = ("half", "float")

Config = dict[str, int]


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def by_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where neighbours in a row are not neighbours in memory; rows may be anywhere."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def size_class(tokens: int) -> str:
    """``"skinny"`` for up to `SKINNY_TOKENS` tokens, else ``"wide"``."""
    return "skinny" if tokens <= SKINNY_TOKENS else "wide"


def dtype_class(dtype: torch.dtype) -> str:
    """``"half"`` for fp16 and bf16, else ``"float"``."""
    return "half" if dtype in (torch.float16, torch.bfloat16) else "float"


@functools.cache
def device_class(device: torch.device) -> str:
    """Whose configurations a device takes; the interpreter runs those of sm_90."""
    if interpreting():
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = device_capability(device.index or 0)
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; a few for the interpreter, so that work is cut there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def config_table(device: str, operator: str) -> dict[str, dict[str, dict[str, Config]]]:
    """Kernel -> size class -> dtype class -> configuration, for a device class and an operator."""
    return json.loads((CONFIGS / device / f"{operator}.json").read_text())


def kernel_config(operator: str, kernel: str, tokens: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of a kernel: block sizes by their names in it, num_warps and num_stages."""
    check_device("a kernel's work", device)
    return config_table(device_class(device), operator)[kernel][size_class(tokens)][dtype_class(dtype)]


def launch(kernel: Any, grid: Sequence[int], *args: Any, device: torch.device, **options: Any) -> None:
    """Run ``kernel`` on ``device``'s current stream. The only place where a kernel of this package is started."""
    if 0 in grid:
        return
    if device.type != "cuda":
        kernel[tuple(grid)](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[tuple(grid)](*args, **options)
