"""The compile cases of all operators, and their compilation by several processes."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from typing import Any, NamedTuple

from graphmoe_kernels.aot.case import CompileCase, configuration, fingerprint, specialization
from graphmoe_kernels.aot.reading import Reading
from graphmoe_kernels.aot.trace import traced
from graphmoe_kernels.launching import Launch

# Each has a function `variants`, of the calls whose launches are compiled: whole layers, then the operators at their
# limits.
MODULES = (
    "graphmoe_kernels.layer_cases",
    "graphmoe_kernels.routing.compile_cases",
    "graphmoe_kernels.gru.compile_cases",
    "graphmoe_kernels.experts.compile_cases",
)


class Job(NamedTuple):
    """One case for one target, by where it is found: kernels do not travel between processes."""

    modules: tuple[str, ...]
    target: str
    number: int
    name: str


@functools.cache
def cases(modules: tuple[str, ...], target: str) -> list[CompileCase]:
    """Return the launches of the modules' variants on a device class, each compiled kernel once.

    They come from the host code of layers and operators, which runs here on tensors without memory: so a case has the
    configuration, the constants and the specialisation of a real launch. Of several of one name the second is "... #2".
    """
    found: dict[Any, CompileCase] = {}
    named: Counter[str] = Counter()
    for module in modules:
        for variant in importlib.import_module(module).variants():
            with traced(target) as steps:
                variant.call()
            for launch in (step for step in steps if isinstance(step, Launch)):
                matrix, key = launch.name in variant.matrix, specialization(launch)
                if key in found:
                    found[key] = found[key]._replace(matrix=found[key].matrix or matrix)
                    continue
                name = f"{launch.name} {variant.name}"
                named[name] += 1
                number = f" #{named[name]}" if named[name] > 1 else ""
                found[key] = CompileCase(name + number, launch, matrix)
    return list(found.values())


def jobs(modules: Sequence[str], targets: Sequence[str], names: Sequence[str] = ("",)) -> list[Job]:
    """The cases of all modules whose name contains one of ``names``, for all targets."""
    return [
        Job(tuple(modules), target, number, case.name)
        for target in targets
        for number, case in enumerate(cases(tuple(modules), target))
        if any(name in case.name for name in names)
    ]


def compile_all(work: Sequence[Job], processes: int) -> Iterator[tuple[Job, Reading]]:
    """The reading of each job, as they come; a job that takes its compiler's process with it has that as its error."""
    waiting = list(reversed(work))
    while waiting:
        suspects: list[Job] = []
        yield from _compile_until_a_crash(waiting, processes, suspects)
        for job in suspects:  # one of them ended the process: each on its own tells which
            yield job, _compile_alone(job)


def _compile_until_a_crash(waiting: list[Job], processes: int, lost: list[Job]) -> Iterator[tuple[Job, Reading]]:
    """Takes jobs from the end of ``waiting``; those under way when a process dies go to ``lost``."""
    with _pool(min(processes, len(waiting))) as pool:
        running: dict[Future[Reading], Job] = {}
        while (waiting or running) and not lost:
            while waiting and len(running) < processes:
                job = waiting.pop()
                running[pool.submit(_inspect, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    lost += [job, *running.values()]
                    return
                yield job, future.result()


def _compile_alone(job: Job) -> Reading:
    case = cases(job.modules, job.target)[job.number]
    with _pool(1) as pool:
        try:
            return pool.submit(_inspect, job).result()
        except BrokenProcessPool:
            error = "the compiler crashed"
    known = configuration(case), fingerprint(case.launch), version("triton")
    return Reading(job.name, job.target, *known, error=error, faults=(error,))


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max(1, processes), mp_context=multiprocessing.get_context("spawn"))


def _inspect(job: Job) -> Reading:
    from graphmoe_kernels.aot.inspector import inspect_case  # imports Triton's compiler: in the workers alone

    return inspect_case(cases(job.modules, job.target)[job.number], job.target)
