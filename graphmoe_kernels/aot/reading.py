"""What was read from a compiled kernel."""

from __future__ import annotations

from typing import NamedTuple


class Reading(NamedTuple):
    """A case compiled for a target.

    Attributes:
        name: the case's name.
        target: the device class.
        configuration: constexprs, warps and stages as text.
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
        blocks_per_sm: blocks that a multiprocessor holds at once; only worked out for sm_90.
        faults: what is wrong with it, from `graphmoe_kernels.aot.limits.faults`.
    """

    name: str
    target: str
    configuration: str
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
    blocks_per_sm: int | None = None
    faults: tuple[str, ...] = ()
