"""A GPU that is not there: Triton compiles for it, and host code runs as beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graphmoe_kernels.backend import standing_for
from graphmoe_kernels.launching import DEVICE_CLASSES

# Backend, architecture and threads of a warp, as Triton names a target.
TRITON_TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class _Driver:
    """What Triton asks a driver for before it compiles: nothing that needs a device."""

    def __init__(self, device_class: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TRITON_TARGETS[device_class])
        self.number = DEVICE_CLASSES.index(device_class)  # Triton keeps kernels by it, and targets must not mix

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def absent_gpu(device_class: str) -> Iterator[None]:
    """Have tensors on the CPU or on meta stand for a GPU of ``device_class``, and Triton compile for it.

    Launches inside have to be stubbed: ``launching.stubbed(bind=True)`` compiles what they would have run.
    """
    from triton.runtime import driver

    try:
        before = driver.active
    except RuntimeError:  # there is no GPU
        before = None
    with standing_for(device_class):
        driver.set_active(_Driver(device_class))
        try:
            yield
        finally:
            driver.set_active(before)
