"""What the device can do, measured in the same run: every share in the report is a share of these."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.devices import Device
from benchmarks.layers import DTYPES
from benchmarks.roofline import Limits

# Assumed, as no library call measures them: from the L2 cache to all multiprocessors and to one of them (64 bytes a
# clock), 32-bit integer operations (64 lanes a multiprocessor), and a launch inside a CUDA graph.
L2_BANDWIDTH = 5.5e12
SM_BANDWIDTH = 110e9
INTEGER = 14e12
LAUNCH = 1.3e-6
# What the limits are measured on: bytes of a copy, and m, n, k of a product.
LIMIT_SIZES = {"cpu": (2**28, (1024, 4096, 1024)), "cuda": (2**31, (8192, 14336, 4096))}
# Measured on an H200 before these kernels ran on one: what the predictions are made with.
H200 = Limits(4.3e12, 790e12, 132, L2_BANDWIDTH, SM_BANDWIDTH, INTEGER, LAUNCH)


def measure_limits(
    device: Device, copy_bytes: int, matrix_size: tuple[int, int, int], seconds: float, dtype: str
) -> dict[str, Any]:
    """Bytes a second of a large copy (read and written) and, on a GPU, of one inside the L2 cache; operations a second
    of a matrix product [m, k] x [k, n] of random data. By the medians of several."""
    kind = DTYPES[dtype]
    large = torch.empty(copy_bytes // kind.itemsize, dtype=kind, device=device.torch).normal_()
    target = torch.empty_like(large)
    m, n, k = matrix_size
    a, b = torch.randn(m, k, device=device.torch, dtype=kind), torch.randn(n, k, device=device.torch, dtype=kind)
    out = torch.empty(m, n, device=device.torch, dtype=kind)
    calls = {
        "copy": lambda: target.copy_(large),
        "matrix product": lambda: torch.mm(a, b.T, out=out),
    }
    timed = device.in_turns(calls, seconds)
    copy, product = timed["copy"].summary(), timed["matrix product"].summary()
    return {
        "copy bytes a second": 2 * copy_bytes / copy["median"],
        "copy bytes": copy_bytes,
        "copy seconds": copy,
        "matrix operations a second": 2 * m * n * k / product["median"],
        "matrix size": [m, n, k],
        "matrix seconds": product,
        "matrix dtype": dtype,
        "L2 copy bytes a second": _l2_copy(device, large, target, seconds / 2) if device.l2_bytes else None,
        "assumed": {
            "L2 bytes a second": L2_BANDWIDTH,
            "bytes a second of one multiprocessor": SM_BANDWIDTH,
            "integer operations a second": INTEGER,
            "launch in a graph, seconds": LAUNCH,
        },
    }


def _l2_copy(device: Device, large: torch.Tensor, target: torch.Tensor, seconds: float) -> float:
    """Bytes a second of copies of a quarter of the L2 cache."""
    small = large[: max(1, min(device.l2_bytes // 4 // large.element_size(), large.numel()))]
    within, repeats = target[: small.numel()], 50

    def copy_often() -> None:
        for _ in range(repeats):
            within.copy_(small)

    cached = device.in_turns({"copy": device.capture(copy_often)}, seconds)["copy"].summary()
    return 2 * small.element_size() * small.numel() * repeats / cached["median"]


def as_limits(measured: dict[str, Any], multiprocessors: int) -> Limits:
    """The measured limits, with the assumed ones beside them."""
    return Limits(
        measured["copy bytes a second"],
        measured["matrix operations a second"],
        multiprocessors,
        L2_BANDWIDTH,
        SM_BANDWIDTH,
        INTEGER,
        LAUNCH,
    )
