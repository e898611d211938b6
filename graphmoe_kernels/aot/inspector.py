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

from graphmoe_kernels.aot import listing
from graphmoe_kernels.aot.absent import TRITON_TARGETS, absent_gpu
from graphmoe_kernels.aot.case import CompileCase, configuration, fingerprint
from graphmoe_kernels.aot.limits import faults, resident_blocks
from graphmoe_kernels.aot.reading import Reading

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Of a compiler's message the end says what was wrong.
ERROR_CHARACTERS = 600


def inspect_case(case: CompileCase, target: str) -> Reading:
    """The reading of ``case`` for ``target`` (a device class); a compilation that fails is a reading too."""
    reading = Reading(case.name, target, configuration(case), fingerprint(case.launch), triton.__version__)
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
        warps=compiled.metadata.num_warps,
    )
    if TRITON_TARGETS[target][0] == "cuda":
        reading = reading._replace(**_read_cubin(compiled.asm["cubin"]))
        blocks = resident_blocks(target, reading.registers, reading.shared_bytes, reading.warps)
        reading = reading._replace(blocks=blocks)
    else:
        reading = reading._replace(**_read_amdgcn(compiled.asm["amdgcn"]))
    return reading._replace(faults=tuple(faults(case, reading)))


def _compile(case: CompileCase, target: str) -> Any:
    """As the launch would, up to the device."""
    launch = case.launch
    with absent_gpu(target):
        return launch.kernel.run(**launch.arguments, **launch.options, grid=launch.grid, warmup=True)


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers and stack from the binary's tables, instructions and loops from its listing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code, jumps = listing.parse(_run("nvdisasm", "-c", "-hex", file.name))
    if not code:
        raise RuntimeError("no instruction in what nvdisasm prints; this Triton's tools differ")

    def count(pattern: str) -> int:
        return sum(re.match(pattern, instruction.name) is not None for instruction in code)

    return {
        "registers": _number(r"\bREG:(\d+)", usage),
        "spill_bytes": max(_number(r"\bSTACK:(\d+)", usage), _number(r"\bLOCAL:(\d+)", usage)),
        "local_loads": count(r"LDL\b"),
        "local_stores": count(r"STL\b"),
        "hgmma": count(r"HGMMA\b"),
        "hmma": count(r"HMMA\b"),
        "tcgen05": count(r"UTC[A-Z0-9]*MMA\b"),
        "loops": tuple(listing.loops(code, jumps)),
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
