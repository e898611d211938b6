"""``python -m graphmoe_kernels.aot``: see `graphmoe_kernels.aot`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from graphmoe_kernels.aot import report
from graphmoe_kernels.aot.catalogue import MODULES, Job, compile_all, jobs
from graphmoe_kernels.aot.reading import Reading, write_readings
from graphmoe_kernels.backend import interpreting
from graphmoe_kernels.launching import DEVICE_CLASSES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m graphmoe_kernels.aot",
        description="Compile the Triton kernels with the configurations that the package ships, without a GPU, and "
        "print what each takes. Fails where a kernel does not compile or takes more shared memory than the device has, "
        "where one spills in an innermost loop on sm_80 or sm_90, and where a matrix kernel has no HGMMA instructions "
        "on sm_90. Columns: spill B is what a thread spills, in loops how many instructions of the innermost loops "
        "write or read it; warps/SM are those that a multiprocessor holds at once; waits those for global loads that "
        "stand between the first and the last load of a pass of the main loop.",
    )
    p.add_argument("--target", action="append", choices=DEVICE_CLASSES, help="may be repeated (default: all)")
    p.add_argument("--kernel", action="append", metavar="TEXT", help="cases with TEXT in their name; may be repeated")
    p.add_argument("--cases", action="append", metavar="MODULE", help="module of cases (default: all operators)")
    p.add_argument("--processes", type=int, default=2, help="compilations at a time (%(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the readings to FILE")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what the command line asks for; 0 when nothing is wrong with it, 1 otherwise."""
    p = parser()
    a = p.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        p.error("the triton package is not installed")
    if interpreting():
        p.error("TRITON_INTERPRET is set: Triton interprets the kernels and compiles none; unset it and run this again")
    work = jobs(a.cases or MODULES, a.target or DEVICE_CLASSES, a.kernel or [""])
    if not work:
        p.error(f"no case's name contains {' or '.join(map(repr, a.kernel))}")
    readings = _compile(work, a.processes)
    out = report.console()
    out.print(report.table(readings))
    if a.json is not None:
        write_readings(a.json, readings)
    for reading in readings:
        for fault in reading.faults:
            out.print(f"{reading.name} for {reading.target}: {fault}", style="red", markup=False, highlight=False)
    faulty = sum(bool(reading.faults) for reading in readings)
    out.print(f"{len(readings)} cases, {faulty} with faults")
    return 1 if faulty else 0


def _compile(work: Sequence[Job], processes: int) -> list[Reading]:
    """The readings in the order of the jobs, with a progress bar meanwhile."""
    done = track(
        compile_all(work, processes), "Compiling", total=len(work), console=report.console(stderr=True), transient=True
    )
    readings = dict(done)
    return [readings[job] for job in work]


if __name__ == "__main__":
    sys.exit(main())
