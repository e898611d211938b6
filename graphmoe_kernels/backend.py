"""Which implementation of an operator runs.

``"auto"`` is Triton for CUDA tensors in fp32, fp16 and bf16, and PyTorch for everything else (other devices, and fp64,
in which the Triton kernels do not compute). An explicit backend that cannot run is an error that says why, and so is
``"auto"`` on a GPU where Triton cannot run: never another path. ``"reference"`` is the plain definition of each
operator: slow, in any float dtype, the oracle of the tests.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from graphmoe_kernels.validation import shown

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)

# Triton's interpreter computes with bfloat16's bits as integers. Whoever repairs it, as the tests do, says so here.
interpreter_repaired = False


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which the tensor's device casts nothing by itself."""
    if tensor.device.type == "meta":  # has no autocast to turn off
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def check_backend(backend: str) -> None:
    """`ValueError` for a name that is no backend's."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"unknown backend {shown(backend)}; expected one of {', '.join(map(repr, BACKENDS))}")


def resolve_backend(backend: str, name: str, tensor: Tensor) -> str:
    """``"triton"``, ``"torch"`` or ``"reference"`` for the requested ``backend`` and an operator's main argument.

    Args:
        backend: what was asked for.
        name: the name of ``tensor`` in messages.
        tensor: the operator's main argument; its device and dtype decide.

    Raises:
        ValueError: an unknown name; Triton asked for where it cannot run (device, dtype, GPU, or not installed).
    """
    check_backend(backend)
    if backend == "auto":
        backend = "triton" if tensor.is_cuda and tensor.dtype != torch.float64 else "torch"
    if backend == "triton":
        _check_triton(name, tensor)
    return backend


def _check_triton(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"{name} is {tensor.dtype}: the Triton kernels take float32, float16 and bfloat16; use backend='torch'"
        )
    if not torch.compiler.is_compiling():  # a traced call cannot ask Triton; the launch does
        check_device(name, tensor.device)
        if tensor.dtype != torch.float32 and interpreting() and not interpreter_repaired:
            raise ValueError(
                f"{name} is {tensor.dtype}: Triton's interpreter computes bfloat16 wrong, so it runs float32 alone"
            )


@functools.cache
def check_device(name: str, device: torch.device) -> None:
    """`ValueError` for a device on which Triton cannot run; ``name`` is what is there. Asked once a device."""
    if not _triton_installed():
        raise ValueError("backend 'triton' needs the triton package, which is not installed; use backend='torch'")
    if interpreting() and device.type in ("cpu", "cuda"):
        return
    if device.type != "cuda":
        raise ValueError(
            f"{name} is on {device}, and backend='triton' runs on CUDA devices; move the tensors there or use "
            "backend='torch' (TRITON_INTERPRET=1, set before the program starts, interprets the kernels on the CPU, in "
            "float32)"
        )
    capability = device_capability(device.index or 0)
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        raise ValueError(
            f"{name} is on a GPU of compute capability {capability[0]}.{capability[1]}; the Triton kernels need 8.0 "
            "(Ampere) or newer; use backend='torch'"
        )


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def device_capability(index: int) -> tuple[int, int]:
    """The compute capability of a CUDA device, asked for once."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1 when it was first imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)
