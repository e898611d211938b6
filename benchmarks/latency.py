"""How long a launch takes, from what the compiler made of it: its chains of loads, its bytes and its operations.

A program goes through its loops pass by pass; of a pass the listing says how many cycles one warp takes and between
which of them it waits for loads (`graphmoe_kernels.aot.listing`). Blocks beyond those that are resident wait for their
turn. A launch takes the largest of that time, its issue slots and its bytes from memory and from the L2 cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from graphmoe_kernels.aot.case import fingerprint
from graphmoe_kernels.aot.cycles import issue_cycles, program_cycles
from graphmoe_kernels.aot.listing import Loop
from graphmoe_kernels.aot.reading import Reading
from graphmoe_kernels.aot.trace import Operation, Step
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.experts.triton.sizes import STREAM_BLOCK
from graphmoe_kernels.launching import Launch
from graphmoe_kernels.structures import tensors_in


class Device(NamedTuple):
    """What a device grants, and where that is from.

    Attributes:
        name, device_class, multiprocessors: of the device.
        copy: bytes a second of a large copy, read and written.
        product: operations a second of a bf16 product [8192, 4096] x [4096, 14336], its bytes included.
        l2: bytes a second from the L2 cache.
        clock: cycles a second under load.
        latency: cycles until a load of global memory is there, on average over L2 and memory.
        source: where these are from.
    """

    name: str
    device_class: str
    multiprocessors: int
    copy: float
    product: float
    l2: float
    clock: float
    latency: int
    source: str

    def product_seconds(self, operations: float, moved: float) -> float:
        """Seconds of a product of cuBLAS: most of its bytes are moved beside its operations (`OVERLAPPED`)."""
        rows, inner, columns = PRODUCT_SIZE
        bytes_ = 2 * (rows * inner + inner * columns + rows * columns)
        whole = 2 * rows * inner * columns
        rate = whole / (whole / self.product - (1 - OVERLAPPED) * bytes_ / self.copy)
        return max(moved / self.copy, operations / rate + (1 - OVERLAPPED) * moved / self.copy)


PRODUCT_SIZE = (8192, 4096, 14336)
# Fitted once to what an H100 measured (`calibration`): the share of a product's bytes that hides behind its operations;
# cycles of a load; and seconds from a launch in a graph until memory delivers at its rate, and at the end of it.
OVERLAPPED = 0.25
LATENCY = 500
LAUNCH, RAMP = 1.3e-6, 2.8e-6
H100_RUN = "results/cuda-2026-11-26T010842.json"
DEVICES = (
    Device(
        "H100", "sm_90", 132, 3.01e12, 797e12, 4.93e12, 1.755e9, LATENCY,
        f"measured ({H100_RUN}), the clock from NVIDIA's tables, the latency fitted",
    ),
    Device(
        "H200", "sm_90", 132, 4.3e12, 797e12, 4.93e12, 1.755e9, LATENCY,
        "the H100's, but for 90% of its 4.8 TB/s of memory: assumed",
    ),
    Device(
        "A100", "sm_80", 108, 1.75e12, 265e12, 3.5e12, 1.41e9, LATENCY,
        "85% of the 80 GB model's 2.04 TB/s and 312 TFLOP/s, and the H100's latency in cycles: assumed",
    ),
)  # fmt: skip


class Time(NamedTuple):
    """How long a step takes, in seconds, and what sets that."""

    seconds: float
    limit: str


def passes_of(launch: Launch, loops: Sequence[Loop], sizes: Sizes) -> list[float]:
    """How often each of a kernel's loops runs in one pass of the loop around it.

    Raises:
        LookupError: it is not said here of this kernel, which has loops.
    """
    if len(loops) == 1:  # what is in no loop
        return [1.0]
    if launch.name in ("experts_forward", "experts_forward_token"):
        return _passes_of_few(launch, loops, sizes)
    if launch.name == "routing_backward":
        return _passes_of_routing_backward(launch, loops)
    main, inner = _main_passes(launch, sizes)
    # The loop that has loops in it, or loads the most, is the main one: others are prologues of few passes.
    outer = [loop for loop in loops if loop.depth == 1]
    chief = max(outer, key=lambda loop: (loop.inner > 0, loop.loads, loop.instructions))
    return [1.0, *(inner if loop.depth > 1 else main if loop is chief else 1.0 for loop in loops[1:])]


def _main_passes(launch: Launch, sizes: Sizes) -> tuple[float, float]:
    """Passes of a kernel's main loop, and of those in it."""
    a, c = launch.arguments, launch.constants
    match launch.name:
        case "experts_stream_backward_weights":  # runs of tiles of the same experts, and tiles of a run
            tiles, tuples = launched_tiles(c["TILE"], c, sizes), math.comb(sizes.experts, c["EXPERTS"])
            runs = 1 + tuples / launch.grid[1]
            return runs, max(1.0, tiles / launch.grid[1] / runs) * c["TILE"] / c["BLOCK_M"]
        case "experts_stream" | "experts_stream_backward_tokens":
            return a["piece"].split_blocks * STREAM_BLOCK / c["BLOCK_F"], 1.0
        case "experts_stream_sum" | "experts_stream_sum_tokens":
            return a["splits"], 1.0
        case "experts_count_tuples":
            return a["chunks"], 1.0
        case "experts_place_rows":
            return math.ceil(launch.grid[0] / c["BLOCK_B"]), 1.0
        case "swiglu_forward" | "swiglu_backward":
            blocks = math.ceil(a["width"] / c["BLOCK_F"]) / launch.grid[1]
            return blocks, math.ceil(max(a["inner"], 1) / c["BLOCK_K"])
        case "gru_forward" | "gru_backward":
            return math.ceil(a["width"] / c["BLOCK_K"]), 1.0
        case "routing_forward":
            return math.ceil(a["hidden"] / c["BLOCK_D"]), 1.0
        case "routing_backward_router":
            return a["tiles"], 1.0
    raise LookupError(
        f"{launch.name} has loops, and benchmarks/latency.py does not know how often they run; say it in _main_passes"
    )


def _passes_of_few(launch: Launch, loops: Sequence[Loop], sizes: Sizes) -> list[float]:
    """Those of a program with one block of F: its loop over M's columns, then two over visits to experts, if any.

    They are the first that load; others, that write zeros and sum the splits, run once.
    """
    c, inner = launch.constants, launch.arguments["inner"]
    drawn_by = min(sizes.tokens, c.get("BLOCK_M", 1)) * c["SLOTS"]
    drawn = sizes.experts * (1 - (1 - 1 / sizes.experts) ** drawn_by)
    counts = [math.ceil(inner / c["BLOCK_K"])] if inner else []
    if "AT_ONCE" in c:
        counts += 2 * [math.ceil(drawn / c["AT_ONCE"])]
    left = iter(counts)
    return [1.0] + [float(next(left, 1)) if loop.loads else 1.0 for loop in loops[1:]]


def _passes_of_routing_backward(launch: Launch, loops: Sequence[Loop]) -> list[float]:
    """Those of a loop over a token's slots, unless it is unrolled, and of the last, over columns of x's gradient."""
    columns = [float(launch.arguments["blocks"])] if launch.arguments["router"] is not None else []
    return [1.0, *[float(launch.constants["TOP_K"])] * (len(loops) - 1 - len(columns)), *columns]


def launched_tiles(block: int, constants: dict[str, Any], sizes: Sizes) -> float:
    """Tiles of so many rows that a launch needs for tokens of uniformly drawn experts: half a tile of padding for every
    tuple.

    Where a tile has one expert of tokens that have several, rows are pairs of a token and a slot.
    """
    experts = constants["EXPERTS"]
    rows, tuples = rows_of_tokens(constants, sizes) * sizes.tokens, math.comb(sizes.experts, experts)
    return (rows + min(tuples, rows) * (block - 1) / 2) / block


def rows_of_tokens(constants: dict[str, Any], sizes: Sizes) -> float:
    """Rows of a token in a launch of a stream."""
    return sizes.top_k / constants["EXPERTS"] / constants["LAUNCHES"]


class Readings:
    """The readings of a device class, found by the launch."""

    def __init__(self, readings: Iterable[Reading], path: Path, device_class: str) -> None:
        self._readings = {reading.fingerprint: reading for reading in readings}
        self._again = f"python -m graphmoe_kernels.aot --target {device_class} --json {path}"

    def of(self, launch: Launch) -> Reading:
        """Return what the compiler made of a launch; `LookupError` where that was not read."""
        found = self._readings.get(fingerprint(launch))
        if found is None:
            raise LookupError(
                f"{launch.name} is not in the readings as a layer launches it; make them again: {self._again}"
            )
        return found


def kernel_bytes(launch: Launch, sizes: Sizes) -> float:
    """Bytes of a launch's tensors, each once: of wide ones its piece of the columns, of the experts' the chosen ones.

    A token's wide rows are read once for each of its rows in a stream, as these are far apart. What a launch adds to is
    read too.
    """
    a, share = launch.arguments, sizes.used_experts / sizes.experts
    rows = max(1.0, rows_of_tokens(launch.constants, sizes)) if "LAUNCHES" in launch.constants else 1.0
    piece = 1.0
    if "piece" in a:
        piece = (a["piece"].end_block - a["piece"].first_block) / math.ceil(a["width"] / STREAM_BLOCK)
    found = 0.0
    for tensor in _once(a.values()):
        part = 1.0
        if "BLOCK_F" not in launch.constants or tensor.dim() < 2:
            pass
        elif tensor.dim() >= 3 and tensor.shape[-3] == a.get("num_experts"):
            part = share * piece
            if tensor.dim() == 4:  # sums of each split, read and written for the experts of its tiles
                experts, splits = launch.constants["EXPERTS"], tensor.shape[0]
                tuples = math.comb(a["num_experts"], experts) / splits + 1
                part = 2 * piece * min(1.0, experts * tuples / a["num_experts"])
        elif tensor.shape[-1] == a.get("width"):
            part = piece * rows
        elif len(tensor) == sizes.tokens and "added" in a:
            part = rows
        found += tensor.numel() * tensor.element_size() * part
    if "piece" in a and a["piece"].number > 0:
        found += sum(each.numel() * each.element_size() for each in tensors_in((a.get("hidden"), a.get("gradients"))))
    return found


def expert_bytes(launch: Launch) -> float:
    """Bytes of the experts' matrices that all tiles of tokens read, most of them from the L2 cache."""
    a, c = launch.arguments, launch.constants
    if "RANK" not in c or "BLOCK_F" not in c or "TILE" in c:
        return 0.0
    columns = (
        a["piece"].end_block * STREAM_BLOCK - a["piece"].first_block * STREAM_BLOCK if "piece" in a else a["width"]
    )
    return 2.0 * launch.grid[0] * c.get("EXPERTS", c["SLOTS"]) * 3 * columns * c["RANK"]


def _once(values: Iterable[Any]) -> Iterator[Tensor]:
    seen = set()
    for tensor in tensors_in(tuple(values)):
        key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)
        if key not in seen:
            seen.add(key)
            yield tensor


def chain_seconds(device: Device, programs: float, blocks: int, cycles: float) -> float:
    """Seconds of programs of so many cycles, ``blocks`` of them at a time on a multiprocessor."""
    return math.ceil(programs / (device.multiprocessors * blocks)) * cycles / device.clock


def launch_time(launch: Launch, reading: Reading, device: Device, sizes: Sizes) -> Time:
    """How long a launch of a layer of these sizes takes."""
    assert reading.blocks is not None
    a, c, programs = launch.arguments, launch.constants, float(math.prod(launch.grid))
    passes = passes_of(launch, reading.loops, sizes)
    if "piece" in a and "TILE" not in c:  # of the tiles that there can be, those that there are
        programs *= min(1.0, launched_tiles(c["BLOCK_M"], c, sizes) / launch.grid[0])
    moved = kernel_bytes(launch, sizes)
    issue = issue_cycles(reading.loops, passes) * programs * reading.warps / (4 * device.multiprocessors)
    times = {
        "loads": chain_seconds(device, programs, reading.blocks, program_cycles(reading.loops, passes, device.latency)),
        "issue": issue / device.clock,
        "memory": moved / device.copy + RAMP,
        "L2": (moved + expert_bytes(launch)) / device.l2 + RAMP,
    }
    limit = max(times, key=lambda name: times[name])
    return Time(times[limit] + LAUNCH, limit)


def step_time(step: Step, device: Device, readings: Readings, sizes: Sizes) -> Time:
    """How long a launch or an operation of PyTorch takes."""
    if isinstance(step, Launch):
        return launch_time(step, readings.of(step), device, sizes)
    return operation_time(step, device)


def operation_time(step: Operation, device: Device) -> Time:
    """How long a product, or an operation that moves its tensors, takes."""
    memory = (step.read + step.written) / device.copy
    if step.product is None:
        return Time(memory + RAMP + LAUNCH, "memory")
    seconds = device.product_seconds(step.operations, step.read + step.written)
    return Time(seconds + RAMP + LAUNCH, "product" if seconds > memory else "memory")


class Measured(NamedTuple):
    """A kernel that was timed on an H100, with the reading of its code.

    Attributes:
        what: the kernel; source: the result that has the time.
        measured: microseconds.
        programs, blocks, warps: as it was launched.
        passes, loops: see `program_cycles`.
    """

    what: str
    measured: float
    source: str
    programs: int
    blocks: int
    warps: int
    passes: list[float]
    loops: list[Loop]

    def predicted(self) -> float:
        """Microseconds by `chain_seconds`."""
        cycles = program_cycles(self.loops, self.passes, LATENCY)
        return 1e6 * (chain_seconds(DEVICES[0], self.programs, self.blocks, cycles) + LAUNCH)


def calibration() -> list[Measured]:
    """The kernels that the latency was fitted to, and those that it was tried on."""
    found = json.loads(Path(__file__).with_name("calibration.json").read_text())
    return [Measured(**each | {"loops": [Loop(*loop) for loop in each["loops"]]}) for each in found]
