"""What a device class grants a program, and what of a compiled kernel is a fault."""

from __future__ import annotations

from graphmoe_kernels.aot.case import CompileCase
from graphmoe_kernels.aot.reading import Reading

# Shared memory (LDS) that one block may ask for, in bytes: NVIDIA's opt-in limits of compute capability 8.0, 9.0 and
# 10.0 (CUDA programming guide, technical specifications), and AMD's 64 KiB for CDNA 3.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# Columns of tensor memory that one block may ask for on sm_100.
TENSOR_MEMORY_LIMIT = 512

# Device classes where a spill in a kernel's innermost loops is a fault: those of GPUs that many people have. One
# outside is paid once per program, or once per run of an outer loop: a few cycles of some ten thousand.
NO_SPILLS = ("sm_80", "sm_90")

# What a multiprocessor of compute capability 8.0, 9.0 and 10.0 has: registers, handed to a warp in units of 256; shared
# memory, of which each block takes 1 KiB more than it asks for; places for warps and for blocks.
REGISTERS = 64 * 1024
REGISTER_UNIT = 256
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
SHARED_RESERVED = 1024
WARPS = 64
BLOCKS = 32
WARP = 32


def resident_blocks(target: str, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Count the blocks of a kernel that a multiprocessor holds at once: registers of a thread, bytes of a block."""
    warp_registers = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        REGISTERS // (max(warp_registers, 1) * num_warps),
        SHARED[target] // (shared_bytes + SHARED_RESERVED),
        WARPS // num_warps,
        BLOCKS,
    )


def faults(case: CompileCase, reading: Reading) -> list[str]:
    """Why the kernel may not ship as it is; empty when it may."""
    if reading.error is not None:
        return [f"does not compile: {reading.error}"]
    found = []
    if reading.shared_bytes > SHARED_LIMIT[reading.target]:
        found.append(f"{reading.shared_bytes} bytes of shared memory; the limit is {SHARED_LIMIT[reading.target]}")
    if reading.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"{reading.tensor_memory} columns of tensor memory; the limit is {TENSOR_MEMORY_LIMIT}")
    if reading.target in NO_SPILLS and reading.spills_in_loops:
        instructions = f"{reading.spills_in_loops} of {reading.local_loads} LDL and {reading.local_stores} STL"
        found.append(f"spills {reading.spill_bytes} bytes, {instructions} instructions in an innermost loop")
    if reading.target == "sm_90" and case.matrix and not reading.hgmma:
        found.append("a matrix kernel without HGMMA instructions")
    return found
