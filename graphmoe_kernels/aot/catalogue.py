"""The compile cases of all operators, and their compilation by several processes."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

from graphmoe_kernels.aot.case import CompileCase
from graphmoe_kernels.aot.reading import Reading
from graphmoe_kernels.launching import Config, config_table

# Each has a function `compile_cases(configs)`; the package before the last dot is the operator whose configurations
# it gets.
MODULES = (
    "graphmoe_kernels.routing.compile_cases",
    "graphmoe_kernels.gru.compile_cases",
    "graphmoe_kernels.experts.compile_cases",
)


class Job(NamedTuple):
    """One case for one target, by where it is found: kernels do not travel between processes."""

    module: str
    target: str
    number: int
    name: str


@functools.cache
def cases(module: str, target: str) -> list[CompileCase]:
    """What a module of `MODULES` offers, with the configurations for ``target``."""
    operator = module.split(".")[-2]

    def configs(kernel: str, size_class: str, dtype_class: str) -> Config:
        return config_table(target, operator)[kernel][size_class][dtype_class]

    return list(importlib.import_module(module).compile_cases(configs))


def jobs(modules: Sequence[str], targets: Sequence[str], names: Sequence[str] = ("",)) -> list[Job]:
    """The cases of all modules whose name contains one of ``names``, for all targets."""
    return [
        Job(module, target, number, case.name)
        for module in modules
        for target in targets
        for number, case in enumerate(cases(module, target))
        if any(name in case.name for name in names)
    ]


def compile_all(work: Sequence[Job], processes: int) -> Iterator[tuple[Job, Reading]]:
    """The reading of each job, as they come."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(processes, len(work))), mp_context=context) as pool:
        futures = {pool.submit(_inspect, job): job for job in work}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _inspect(job: Job) -> Reading:
    from graphmoe_kernels.aot.inspector import inspect_case  # imports Triton's compiler: in the workers alone

    return inspect_case(cases(job.module, job.target)[job.number], job.target)
