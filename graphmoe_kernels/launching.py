"""How a Triton kernel is launched: its configuration by device, batch size and dtype, the launch, and its record.

Nothing is tuned at first call. ``configs/<device class>/<operator>.json`` holds one configuration for every kernel of
an operator, size class and dtype class; `make tune` rewrites it on a GPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.backend import check_device, device_capability, interpreting, per_device, stands_for

CONFIGS = Path(__file__).parent / "configs"
# Device classes and the multiprocessors of the device that each is named after: A100, H100, B200 and MI300X.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
DEVICE_CLASSES = tuple(MULTIPROCESSORS)

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


def with_row_stride(tensor: Tensor) -> tuple[Tensor, int]:
    """Return `by_rows` of the tensor, and how far apart its rows are."""
    row, column = tensor.stride()
    if column != 1:
        tensor = tensor.contiguous()
        row = tensor.stride(0)
    return tensor, row


def size_class(tokens: int) -> str:
    """``"skinny"`` for up to `SKINNY_TOKENS` tokens, else ``"wide"``."""
    return "skinny" if tokens <= SKINNY_TOKENS else "wide"


def dtype_class(dtype: torch.dtype) -> str:
    """``"half"`` for fp16 and bf16, else ``"float"``."""
    return "half" if dtype in (torch.float16, torch.bfloat16) else "float"


@per_device
def device_class(device: torch.device) -> str:
    """Whose configurations a device takes; the interpreter runs those of sm_90."""
    target = stands_for(device)
    if target is not None:
        return target
    if interpreting():
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = device_capability(device.index or 0)
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


@per_device
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; a few for the interpreter, so that work is cut there too."""
    target = stands_for(device)
    if target is not None:
        return MULTIPROCESSORS[target]
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def config_table(device: str, operator: str) -> dict[str, dict[str, dict[str, Config]]]:
    """Kernel -> size class -> dtype class -> configuration, for a device class and an operator."""
    return json.loads((CONFIGS / device / f"{operator}.json").read_text())


def kernel_config(kernel: str, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of a kernel: block sizes by their names in it, num_warps and num_stages."""
    check_device("a kernel's work", device)
    return class_config(kernel, num_tokens, dtype, device_class(device))


def class_config(kernel: str, num_tokens: int, dtype: torch.dtype, device_class: str) -> Config:
    """`kernel_config` by the device's class."""
    operator = kernel.partition("_")[0]
    return config_table(device_class, operator)[kernel][size_class(num_tokens)][dtype_class(dtype)]


class Launch(NamedTuple):
    """A launch of a kernel, as `recorded` enters it.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along each axis.
        arguments: what the kernel got, by the names of its parameters: tensors, numbers, None, and the constants
            (``tl.constexpr``), whose names are capitals.
        options: num_warps and num_stages.
        device: where it was launched.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: Config
    device: torch.device

    @property
    def name(self) -> str:
        """The kernel's name, by which configurations, compile cases and benchmarks know it too."""
        return self.kernel.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that are compiled into the kernel because they are its ``tl.constexpr`` parameters."""
        return {name: value for name, value in self.arguments.items() if name.isupper()}

    def again(self) -> None:
        """Launch the kernel once more, on the same tensors."""
        launch(self.kernel, self.grid, **self.arguments, **self.options, device=self.device)


# Lists that launches are entered in, and what becomes of a launch: it happens, or stops before the device. For all
# threads alike: a backward's launches come from autograd's own.
_records: list[list[Launch]] = []
_stub: str | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Enter every launch of any thread, in order, in the list that this yields. Tensors in it are kept alive."""
    found: list[Launch] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records[:] = [each for each in _records if each is not found]


@contextmanager
def stubbed(bind: bool = False) -> Iterator[None]:
    """Have launches do nothing: what they would have written stays as it is.

    With ``bind`` Triton binds and specialises the arguments, compiles the kernel where it has not yet, and stops there;
    without a GPU that takes `graphmoe_kernels.aot.absent_gpu` around it.
    """
    global _stub
    before, _stub = _stub, "bind" if bind else "nothing"
    try:
        yield
    finally:
        _stub = before


def launch(kernel: Any, grid: Sequence[int], *args: Any, device: torch.device, **options: Any) -> None:
    """Run ``kernel`` on ``device``'s current stream. The only place where a kernel of this package is started."""
    if 0 in grid:
        return
    if _records:
        _record(kernel, grid, args, options, device)
    if _stub is not None:
        if _stub == "bind":
            kernel.run(*args, grid=tuple(grid), warmup=True, **options)
        return
    if device.type != "cuda":
        if stands_for(device) is not None:
            raise RuntimeError(f"{kernel.__name__} cannot run: {device} only stands for a GPU; use launching.stubbed()")
        kernel[tuple(grid)](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[tuple(grid)](*args, **options)


def _record(
    kernel: Any, grid: Sequence[int], args: Sequence[Any], options: dict[str, Any], device: torch.device
) -> None:
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | options
    arguments = {name: given.pop(name) for name in names}  # what is left is the kernel's options
    for found in _records:
        found.append(Launch(kernel, tuple(grid), arguments, given, device))
