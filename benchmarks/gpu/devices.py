"""Where the report runs: a CUDA device, or the CPU that stands in for one where the code path is to be tried."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

MIN_TURNS = 5
MAX_TURNS = 200
# Of a device that does not say: an H200's L2 cache.
L2_BYTES = 60 * 2**20

Call = Callable[[], object]


class Samples(NamedTuple):
    """Seconds of one call, turn by turn."""

    seconds: list[float]

    def summary(self) -> dict[str, Any]:
        """Median, quartiles, shortest and number of turns."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return {
            "median": statistics.median(self.seconds),
            "quartiles": [low, high],
            "best": min(self.seconds),
            "turns": len(self.seconds),
        }


class CpuDevice:
    """The same steps on the CPU, timed by the host's clock: its figures say nothing about a GPU."""

    kind = "cpu"
    torch = torch.device("cpu")
    l2_bytes = 0

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def describe(self) -> dict[str, Any]:
        """What the device is."""
        return {"name": "CPU", "l2 bytes": self.l2_bytes}

    def capture(self, call: Call) -> Call:
        """``call`` itself; on a GPU a graph of it."""
        call()
        return call

    def synchronize(self) -> None:
        """Nothing: a call returns when it is done."""

    def release(self) -> None:
        """Nothing to give back."""

    def peak_bytes(self, call: Call) -> int | None:
        """None: the host's memory is not counted."""
        call()
        return None

    def in_turns(self, calls: Mapping[str, Call], seconds: float) -> dict[str, Samples]:
        """Times every call once a turn, in an order drawn anew, until ``seconds`` are over; `MIN_TURNS` at least."""
        found: dict[str, Samples] = {name: Samples([]) for name in calls}
        for name in _turns(calls, seconds):
            start = self.clock()
            calls[name]()
            found[name].seconds.append(self.clock() - start)
        return found


class CudaDevice:
    """A CUDA device: device events, graphs, peak memory."""

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        self.torch = torch.device("cuda", index)
        self.properties = torch.cuda.get_device_properties(self.torch)
        self.l2_bytes = int(getattr(self.properties, "L2_cache_size", L2_BYTES) or L2_BYTES)

    def describe(self) -> dict[str, Any]:
        """Name, memory, multiprocessors, and what nvidia-smi tells of driver, clocks and power."""
        p = self.properties
        return {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory bytes": p.total_memory,
            "l2 bytes": self.l2_bytes,
            **_nvidia_smi(),
        }

    def capture(self, call: Call) -> Call:
        """A replay of the CUDA graph of ``call``, which must not wait for the device."""
        stream = torch.cuda.Stream(self.torch)
        stream.wait_stream(torch.cuda.current_stream(self.torch))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, fills caches, makes handles: none of it may happen inside
                call()
        torch.cuda.current_stream(self.torch).wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> object:
            graph.replay()
            return kept

        replay()
        self.synchronize()
        return replay

    def synchronize(self) -> None:
        """Wait for the device; a fault of a kernel is raised here."""
        torch.cuda.synchronize(self.torch)

    def release(self) -> None:
        """Give unused memory back, so that what comes next finds it."""
        gc.collect()
        torch.cuda.empty_cache()

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that ``call`` held beyond what was there before it."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch) - before

    def in_turns(self, calls: Mapping[str, Call], seconds: float) -> dict[str, Samples]:
        """As `CpuDevice.in_turns`, by device events; the device is waited for after every call's turn."""
        found: dict[str, Samples] = {name: Samples([]) for name in calls}
        for call in calls.values():
            call()
        self.synchronize()
        for name in _turns(calls, seconds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            found[name].seconds.append(1e-3 * start.elapsed_time(end))
        return found


Device = CpuDevice | CudaDevice


def _turns(calls: Mapping[str, Call], seconds: float) -> Iterator[str]:
    """The names, every one once a turn: what disturbs the machine falls on all alike."""
    order, shuffle = list(calls), random.Random(0).shuffle
    start = time.perf_counter()
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and time.perf_counter() - start > seconds:
            return
        shuffle(order)
        yield from order


def _nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power as they are; nothing is set. Empty where the tool is missing."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        line = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
        return dict(zip(fields, (word.strip() for word in line.split(",")), strict=False))
    return {}
