"""Which implementation of an operator runs.

``"auto"`` is Triton for CUDA tensors in fp32, fp16 and bf16, and PyTorch for everything else (other devices, and fp64,
in which the Triton kernels do not compute). An explicit backend that cannot run is an error that says why, and so is
``"auto"`` on a GPU where Triton cannot run: never another path. ``"reference"`` is the plain definition of each
operator: slow, in any float dtype, the oracle of the tests.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from graphmoe_kernels.validation import check_choice

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)

# Triton's interpreter computes with bfloat16's bits as integers. Whoever repairs it, as the tests do, says so here.
interpreter_repaired = False

# The device class that tensors on no GPU stand for; see `standing_for`.
_target: str | None = None
_caches: list[Any] = []
# Answers of one function that are kept: there is one for every token count that occurs.
KEPT_ANSWERS = 4096

Cached = TypeVar("Cached", bound=Callable[..., Any])


def per_device(function: Cached) -> Cached:
    """Keep what ``function`` answers about a device and its configurations, until `forget_answers`."""
    cached: Any = functools.lru_cache(KEPT_ANSWERS)(function)
    _caches.append(cached)
    return cached


def forget_answers() -> None:
    """Have all that is kept `per_device` be asked again: a device stands for another, or configurations changed."""
    for cached in _caches:
        cached.cache_clear()


@contextmanager
def standing_for(device_class: str) -> Iterator[None]:
    """Have tensors on the CPU or on meta stand for tensors on a GPU of ``device_class``, for `launching.stubbed`.

    Host code of the Triton backend runs inside as it would there: its checks of the device pass, and it takes the
    device class's configurations. A launch that is not stubbed raises ``RuntimeError``.
    """
    before = _target
    _set_target(device_class)
    try:
        yield
    finally:
        _set_target(before)


def _set_target(device_class: str | None) -> None:
    global _target
    _target = device_class
    forget_answers()


def stands_for(device: torch.device) -> str | None:
    """The device class that ``device`` stands for, or None where it is what it is."""
    return None if device.type == "cuda" else _target


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context in which the tensor's device casts nothing by itself."""
    if tensor.device.type == "meta":  # has no autocast to turn off
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def check_backend(backend: str) -> None:
    """`ValueError` for a name that is no backend's."""
    check_choice("backend", backend, BACKENDS)


def resolve_backend(backend: str, name: str, tensor: Tensor) -> str:
    """``"triton"``, ``"torch"`` or ``"reference"`` for the requested ``backend`` and an operator's main argument.

    Args:
        backend: what was asked for.
        name: the name of ``tensor`` in messages.
        tensor: the operator's main argument; its device and dtype decide.

    Raises:
        ValueError: an unknown name; Triton asked for where it cannot run (device, dtype, GPU, or not installed).
    """
    if isinstance(backend, str) and backend == "auto":
        backend = "triton" if tensor.is_cuda and tensor.dtype != torch.float64 else "torch"
    else:
        check_backend(backend)
    if backend == "triton":
        _check_triton(name, tensor)
    return backend


def _check_triton(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"{name} is {tensor.dtype}: the Triton kernels take float32, float16 and bfloat16; use backend='torch'"
        )
    if _target is None and not torch.compiler.is_compiling():  # a traced call cannot ask Triton; the launch does
        check_device(name, tensor.device)
        if tensor.dtype != torch.float32 and interpreting() and not interpreter_repaired:
            raise ValueError(
                f"{name} is {tensor.dtype}: Triton's interpreter computes bfloat16 wrong, so it runs float32 alone"
            )


@per_device
def check_device(name: str, device: torch.device) -> None:
    """`ValueError` for a device on which Triton cannot run; ``name`` is what is there. Asked once per device."""
    if stands_for(device) is not None:
        return
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


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1 when it was first imported)."""
    return _target is None and _interpreter_chosen()


@functools.cache
def _interpreter_chosen() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
