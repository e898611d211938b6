"""What the device can do, measured in the same run: every share in the report is a share of these."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.devices import Device
from benchmarks.operators import DTYPES
from benchmarks.work import Work

# What the limits are measured on: bytes of a copy, and m, n, k of a product.
LIMIT_SIZES = {"cpu": (2**28, (1024, 4096, 1024)), "cuda": (2**31, (8192, 14336, 4096))}
SMALL_SIZES = (2**20, (64, 64, 64))  # for the tiny model, whose figures mean nothing


class Limits(NamedTuple):
    """Bytes a second of device memory, operations a second of the matrix units, multiprocessors; the rest is assumed,
    as no library call measures it: L2 to all multiprocessors and to one (64 bytes a clock), 32-bit integer operations
    (64 lanes a multiprocessor), and a launch inside a CUDA graph."""

    bandwidth: float
    matrix: float
    multiprocessors: int
    l2_bandwidth: float = 5.5e12
    sm_bandwidth: float = 110e9
    integer: float = 14e12
    launch: float = 1.3e-6

    def times(self, work: Work) -> dict[str, float]:
        """Seconds that each limit alone asks for."""
        busy = min(work.programs, self.multiprocessors)
        return {
            "memory": (work.bytes or 0.0) / self.bandwidth,
            "L2": work.l2_bytes / min(self.l2_bandwidth, busy * self.sm_bandwidth),
            "matrix": work.operations / (self.matrix * busy / self.multiprocessors),
            "integer": work.integer / (self.integer * busy / self.multiprocessors),
        }


# Measured on an H200 before these kernels ran on one: what the predictions are made with.
H200 = Limits(4.3e12, 790e12, 132)


def measure_limits(
    device: Device, copy_bytes: int, matrix_size: tuple[int, int, int], seconds: float, dtype: str
) -> dict[str, Any]:
    """Bytes a second of a large copy (read and written), operations a second of a matrix product [m, k] x [k, n] of
    random data, by the medians of several; and what is assumed."""
    kind = DTYPES[dtype]
    large = torch.empty(copy_bytes // kind.itemsize, dtype=kind, device=device.torch).normal_()
    target = torch.empty_like(large)
    m, n, k = matrix_size
    a, b = torch.randn(m, k, device=device.torch, dtype=kind), torch.randn(n, k, device=device.torch, dtype=kind)
    out = torch.empty(m, n, device=device.torch, dtype=kind)
    calls = {"copy": lambda: target.copy_(large), "matrix product": lambda: torch.mm(a, b.T, out=out)}
    timed = device.in_turns(calls, seconds)
    copy, product = timed["copy"].summary(), timed["matrix product"].summary()
    assumed = Limits(0.0, 0.0, 0)
    return {
        "copy bytes a second": 2 * copy_bytes / copy["median"],
        "copy bytes": copy_bytes,
        "copy seconds": copy,
        "matrix operations a second": 2 * m * n * k / product["median"],
        "matrix size": [m, n, k],
        "matrix seconds": product,
        "matrix dtype": dtype,
        "assumed": {
            "L2 bytes a second": assumed.l2_bandwidth,
            "bytes a second of one multiprocessor": assumed.sm_bandwidth,
            "integer operations a second": assumed.integer,
            "launch in a graph, seconds": assumed.launch,
        },
    }


def limits_of(content: dict[str, Any]) -> Limits:
    """Those that a result measured."""
    found, device = content["limits"], content["conditions"]["device"]
    rates = found["copy bytes a second"], found["matrix operations a second"]
    return Limits(*rates, device.get("multiprocessors", 4))
