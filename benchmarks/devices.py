"""Where the benchmarks run, the CPU or a CUDA device: its clock, its graphs, its memory."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch's profiler writes two lines to stderr for every use of it, which counts peak memory here.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch.profiler import ProfilerActivity, profile

# Two runs in which nothing changed agree within the ranges of their ratios, but for 1 in 462 of so many turns each.
MIN_TURNS = 6
MAX_TURNS = 200
# Of a device that does not say: an H200's L2 cache.
L2_BYTES = 60 * 2**20

Call = Callable[[], object]


class Samples(NamedTuple):
    """Seconds of one call, turn by turn."""

    seconds: list[float]

    def of_one(self, calls: int) -> Samples:
        """Of one of the ``calls`` equal calls that a turn made."""
        return Samples([each / calls for each in self.seconds])

    def summary(self) -> dict[str, Any]:
        """Median, quartiles, shortest and number of turns."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return {
            "median": statistics.median(self.seconds),
            "quartiles": [low, high],
            "best": min(self.seconds),
            "turns": len(self.seconds),
        }

    def over(self, other: Samples) -> dict[str, Any]:
        """How many times as long as ``other``, turn by turn: median, lowest and highest.

        Both calls of a turn meet the same machine, so this varies less than the two times do.
        """
        ratios = [mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)]
        return {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


def repeated(call: Call, times: int) -> Call:
    """``call`` so many times, one behind the other."""

    def repeat() -> None:
        for _ in range(times):
            call()

    return call if times == 1 else repeat


class CpuDevice:
    """The CPU, by the host's clock; no graphs."""

    kind = "cpu"
    graphs = False
    torch = torch.device("cpu")
    l2_bytes = 0

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def describe(self) -> dict[str, Any]:
        """The processor and how many threads PyTorch uses."""
        capability = torch.backends.cpu.get_cpu_capability()
        return {"name": f"{_cpu_model()} ({capability})", "threads": torch.get_num_threads()}

    @contextlib.contextmanager
    def memory_bounded(self) -> Iterator[None]:
        """Inside, an allocation beyond the free memory raises, as on a GPU, instead of taking the machine with it."""
        try:
            used, free = _kilobytes("/proc/self/status", "VmData"), _kilobytes("/proc/meminfo", "MemAvailable")
        except OSError:  # no Linux
            yield
            return
        import resource

        before = resource.getrlimit(resource.RLIMIT_DATA)
        limit = 1024 * (used + free)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if before[1] < 0 else min(limit, before[1]), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)

    def capture(self, call: Call) -> Call:
        """``call`` itself; on a GPU a graph of it."""
        call()
        return call

    def synchronize(self) -> None:
        """Nothing: a call returns when it is done."""

    def release(self) -> None:
        """Free what only cycles keep: large tensors among them."""
        gc.collect()

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that PyTorch's allocator held for ``call`` beyond what was there before it."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            call()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        held = peak = 0
        for event in events:
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def in_turns(self, calls: Mapping[str, Call], seconds: float) -> dict[str, Samples]:
        """Times every call once a turn, in an order drawn anew, until ``seconds`` are over; `MIN_TURNS` at least."""
        found = {name: Samples([]) for name in calls}
        for name in _turns(calls, seconds):
            start = self.clock()
            calls[name]()
            found[name].seconds.append(self.clock() - start)
        return found


class CudaDevice:
    """A CUDA device: device events, graphs, peak memory."""

    kind = "cuda"
    graphs = True

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

    def memory_bounded(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: PyTorch raises where the device's memory ends."""
        return contextlib.nullcontext()

    def capture(self, call: Call) -> Call:
        """A replay of the CUDA graph of ``call``, which must not wait for the device.

        Raises:
            RuntimeError: it cannot be captured, and why.
        """
        stream = torch.cuda.Stream(self.torch)
        stream.wait_stream(torch.cuda.current_stream(self.torch))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, fills caches, makes handles: none of it may happen inside
                call()
        torch.cuda.current_stream(self.torch).wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        failed: Exception | None = None
        kept: object = None
        try:
            with torch.cuda.graph(graph):
                try:
                    kept = call()
                except Exception as error:  # the end of the capture raises too, and would hide it
                    failed = error
        except Exception as error:
            failed = failed or error
        if failed is not None:
            # Back to the stream that the capture left, and a capture that ends: it frees the random generator.
            torch.cuda.set_stream(torch.cuda.default_stream(self.torch))
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=self.torch)
            raise RuntimeError(f"cannot be captured: {failed}") from failed

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
        found = {name: Samples([]) for name in calls}
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


def _kilobytes(path: str, name: str) -> int:
    """A figure that Linux tells in a file of ``name: figure kB``."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


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
