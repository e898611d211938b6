"""Where the benchmarks run, the CPU or a CUDA device: its clock, its graphs, its memory."""

from __future__ import annotations

import contextlib
import gc
import itertools
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


class _Turns:
    """What both kinds of device do alike; each has its own ``time``."""

    time: Callable[[Call], float]

    def in_turns(self, calls: Mapping[str, Call], seconds: float) -> dict[str, Samples]:
        """Times every call once a turn, in an order drawn anew, until ``seconds`` are over; `MIN_TURNS` at least.

        What disturbs the machine falls on all alike.
        """
        found = {name: Samples([]) for name in calls}
        order, shuffle = list(calls), random.Random(0).shuffle
        start = time.perf_counter()
        for turn in range(MAX_TURNS):
            if turn >= MIN_TURNS and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for name in order:
                found[name].seconds.append(self.time(calls[name]))
        return found


class CpuDevice(_Turns):
    """The CPU, by the host's clock; no graphs."""

    kind, graphs, l2_bytes = "cpu", False, 0
    torch = torch.device("cpu")

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def describe(self) -> dict[str, Any]:
        """The processor and how many threads PyTorch uses."""
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = (names or [platform.processor() or platform.machine()])[0]
        return {"name": f"{name} ({torch.backends.cpu.get_cpu_capability()})", "threads": torch.get_num_threads()}

    @contextlib.contextmanager
    def memory_bounded(self) -> Iterator[None]:
        """By the system's limit, on Linux."""
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

    def peak_bytes(self, call: Call) -> int:
        """The most memory that PyTorch's allocator held for ``call`` beyond what was there before it."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            call()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
        return max(itertools.accumulate((event.nbytes() for event in events), initial=0))

    def time(self, call: Call) -> float:
        """Seconds of a call."""
        start = self.clock()
        call()
        return self.clock() - start


class CudaDevice(_Turns):
    """A CUDA device: device events, graphs, peak memory."""

    kind, graphs = "cuda", True

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

    def peak_bytes(self, call: Call) -> int:
        """The most memory that ``call`` held beyond what was there before it."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch) - before

    def time(self, call: Call) -> float:
        """Seconds of a call by device events; the device is waited for after every call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def in_turns(self, calls: Mapping[str, Call], seconds: float) -> dict[str, Samples]:
        """After a first call of each, which is not timed."""
        for call in calls.values():
            call()
        self.synchronize()
        return super().in_turns(calls, seconds)


Device = CpuDevice | CudaDevice


def _kilobytes(path: str, name: str) -> int:
    """A figure that Linux tells in a file of ``name: figure kB``."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))


def _nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power as they are; nothing is set. Empty where the tool is missing."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        line = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
        return dict(zip(fields, (word.strip() for word in line.split(",")), strict=False))
    return {}
