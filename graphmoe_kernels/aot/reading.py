"""What was read from a compiled kernel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from graphmoe_kernels.aot.listing import Loop, main_loop


class Reading(NamedTuple):
    """A case compiled for a target.

    Attributes:
        name: the case's name.
        target: the device class.
        configuration: constexprs, warps and stages as text.
        fingerprint: of what tells its compiled kernel from others.
        triton: the version that compiled it.
        error: why it did not compile; None when it did.
        seconds: wall time of the compilation; short when Triton's cache had it.
        shared_bytes: shared memory of a block.
        tensor_memory: columns of tensor memory of a block (sm_100).
        registers: registers of a thread (on AMD the vector registers).
        spill_bytes: stack of a thread, which is where registers are spilled to.
        local_loads: LDL instructions (on AMD scratch loads): what was spilled is read back.
        local_stores: STL instructions (on AMD scratch stores).
        hgmma: warp-group matrix instructions of sm_90.
        hmma: warp matrix instructions of sm_80.
        tcgen05: matrix instructions of sm_100.
        mfma: matrix instructions of AMD.
        warps: warps of a block.
        blocks: blocks that a multiprocessor holds at once; None on AMD.
        loops: what is in no loop, then the loops (`graphmoe_kernels.aot.listing.loops`); none on AMD.
        faults: what is wrong with it, from `graphmoe_kernels.aot.limits.faults`.
    """

    name: str
    target: str
    configuration: str
    fingerprint: str
    triton: str
    error: str | None = None
    seconds: float = 0.0
    shared_bytes: int = 0
    tensor_memory: int = 0
    registers: int = 0
    spill_bytes: int = 0
    local_loads: int = 0
    local_stores: int = 0
    hgmma: int = 0
    hmma: int = 0
    tcgen05: int = 0
    mfma: int = 0
    warps: int = 0
    blocks: int | None = None
    loops: tuple[Loop, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def resident_warps(self) -> int | None:
        """Warps that a multiprocessor holds at once; None on AMD."""
        return None if self.blocks is None else self.blocks * self.warps

    @property
    def spills_in_loops(self) -> int:
        """LDL and STL instructions of the loops that have none in them; of a kernel without loops, all of them."""
        if len(self.loops) < 2:
            return self.local_loads + self.local_stores
        return sum(loop.spills for loop in self.loops if loop.depth and not loop.inner)

    @property
    def waits_between_loads(self) -> int | None:
        """Waits for loads between the first and the last load of the main loop's pass; None without such a loop."""
        loop = main_loop(self.loops)
        return None if loop is None else loop.between


def write_readings(path: Path, readings: Sequence[Reading]) -> None:
    """Write readings as JSON, one on a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(reading._asdict()) for reading in readings) + "\n]\n")


def read_readings(path: Path) -> list[Reading]:
    """Return what `write_readings` has written."""
    return [_reading(each) for each in json.loads(path.read_text())]


def _reading(fields: dict[str, Any]) -> Reading:
    loops = tuple(Loop(*loop)._replace(waits=tuple(map(tuple, loop[-1]))) for loop in fields["loops"])
    return Reading(**fields | {"loops": loops, "faults": tuple(fields["faults"])})
