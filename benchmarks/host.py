"""The host's part of a layer: CPU time of a call at sizes where there is little else, and where it goes.

On PyTorch a call is measured as it is. On Triton the CPU stands for a GPU and a launch stops before the device
("unlaunched": does nothing; "bound": Triton binds and specialises its arguments first), in a process of its own. What
launches would have computed is not there, so these calls are not checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from typing import TypeVar

import torch

from benchmarks.cases import Case
from benchmarks.devices import CpuDevice
from benchmarks.providers import STUBBED
from graphmoe_kernels.aot.absent import absent_gpu

TARGET = "sm_90"
SECONDS = 600.0  # that the process may take
R = TypeVar("R")


@contextmanager
def alone(case: Case) -> Iterator[CpuDevice]:
    """The CPU by the time that this process was on it, which other programs hardly change; for stubbed cases it stands
    for a GPU. Inside, PyTorch uses one thread, as a second one would spin beside work of some microseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with absent_gpu(TARGET) if is_stubbed(case) else nullcontext():
            yield CpuDevice(time.process_time)
    finally:
        torch.set_num_threads(before)


def is_stubbed(case: Case) -> bool:
    """Whether any of a case's contenders stops before the device."""
    return any(contender.provider in STUBBED for contender in case.contenders)


def in_own_process(function: Callable[..., R], *arguments: object) -> R:
    """What a function returns, or raises, in a new process, without Triton's interpreter, which binds no argument."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result(SECONDS)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
