"""Compile one case for one target, on any machine, and read what came out.

Triton's wheel holds all that it takes: LLVM, ptxas, cuobjdump and nvdisasm. No GPU and no CUDA toolkit is needed, but a
process in which Triton compiles: one started without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import triton

from graphmoe_kernels.aot.absent import TRITON_TARGETS, absent_gpu
from graphmoe_kernels.aot.case import CompileCase, configuration
from graphmoe_kernels.aot.limits import faults, sm_90_blocks
from graphmoe_kernels.aot.reading import Reading

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Of a compiler's message the end says what was wrong.
ERROR_CHARACTERS = 600

# An instruction of nvdisasm's listing: its address in a comment, perhaps a predicate, then its name.
SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)")


def inspect_case(case: CompileCase, target: str) -> Reading:
    """The reading of ``case`` for ``target`` (a device class); a compilation that fails is a reading too."""
    reading = Reading(case.name, target, configuration(case), triton.__version__)
    start = time.perf_counter()
    try:
        compiled = _compile(case, target)
    except Exception as error:  # whatever a compiler throws: Python, LLVM or a subprocess
        message = f"{type(error).__name__}: {str(error).strip()[-ERROR_CHARACTERS:]}"
        reading = reading._replace(error=message, seconds=time.perf_counter() - start)
        return reading._replace(faults=tuple(faults(case, reading)))
    reading = reading._replace(
        seconds=time.perf_counter() - start,
        shared_bytes=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
    )
    if TRITON_TARGETS[target][0] == "cuda":
        reading = reading._replace(**_read_cubin(compiled.asm["cubin"]))
    else:
        reading = reading._replace(**_read_amdgcn(compiled.asm["amdgcn"]))
    if target == "sm_90":
        blocks = sm_90_blocks(reading.registers, reading.shared_bytes, compiled.metadata.num_warps)
        reading = reading._replace(blocks_per_sm=blocks)
    return reading._replace(faults=tuple(faults(case, reading)))


def _compile(case: CompileCase, target: str) -> Any:
    """As the launch would, up to the device."""
    launch = case.launch
    with absent_gpu(target):
        return launch.kernel.run(**launch.arguments, **launch.options, grid=launch.grid, warmup=True)


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers and stack from the binary's tables, instructions from its listing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    instructions = SASS_INSTRUCTION.findall(listing)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in instructions)

    return {
        "registers": _number(r"\bREG:(\d+)", usage),
        "spill_bytes": max(_number(r"\bSTACK:(\d+)", usage), _number(r"\bLOCAL:(\d+)", usage)),
        "local_loads": count(r"LDL\b"),
        "local_stores": count(r"STL\b"),
        "hgmma": count(r"HGMMA\b"),
        "hmma": count(r"HMMA\b"),
        "tcgen05": count(r"UTC[A-Z0-9]*MMA\b"),
    }


def _read_amdgcn(assembly: str) -> dict[str, Any]:
    """The same from the assembly and the metadata at its end."""
    return {
        "registers": _number(r"\.vgpr_count:?\s+(\d+)", assembly),
        "spill_bytes": _number(r"\.private_segment_fixed_size:?\s+(\d+)", assembly),
        "local_loads": len(re.findall(r"^\s+scratch_load", assembly, re.MULTILINE)),
        "local_stores": len(re.findall(r"^\s+scratch_store", assembly, re.MULTILINE)),
        "mfma": len(re.findall(r"^\s+v_mfma", assembly, re.MULTILINE)),
    }


def _number(pattern: str, text: str) -> int:
    """The number that the pattern finds; one that is not there is a change of the tool's output, and an error."""
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the compiler's tools print; this Triton's tools differ")
    return int(found[1])


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
