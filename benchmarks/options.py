"""The options of `pytest benchmarks`, and the cases that they choose."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.cases import GROUPS, NOT_BY_DEFAULT, OPERATOR_GROUPS, Case
from benchmarks.devices import MIN_TURNS, CpuDevice, CudaDevice, Device
from benchmarks.providers import PROVIDERS, missing
from benchmarks.sizes import MODELS, Model
from benchmarks.table import DTYPES, PLANS, Plan, rank, table
from graphmoe_kernels.cost import DTYPES as KNOWN_DTYPES

DEFAULT_SIZES = {"cpu": "llama-3.2-1b", "cuda": "llama-3-8b"}
SECONDS = {"cpu": 1.0, "cuda": 0.5}


def add_options(parser: pytest.Parser) -> None:
    """Declares them."""
    add = parser.getgroup("GraphMoE benchmarks").addoption
    seconds = ", ".join(f"{value:g} on {device}" for device, value in SECONDS.items())
    sizes = ", ".join(f"{name} on {device}" for device, name in DEFAULT_SIZES.items())
    add("--sizes", help=f"whose layers, of {', '.join(MODELS)}; several with commas (default: {sizes})")
    add("--groups", help=f"what is timed, of {', '.join(GROUPS)} (default: all but {', '.join(NOT_BY_DEFAULT)})")
    add("--providers", help=f"who is timed, of {', '.join(PROVIDERS)} (default: all that can run)")
    add("--tokens", help="token counts of operators and layers, e.g. 1,64,512; the largest is the main one")
    add("--dtype", choices=tuple(KNOWN_DTYPES), help="(default: bf16 on cuda, fp32 on cpu)")
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    add("--seconds", type=float, help=f"of timing a case, {MIN_TURNS} turns at least (default: {seconds})")
    add("--minutes", type=float, help="measure what is most important first, and begin nothing that would take longer")
    add("--save-results", action="store_true", help="also write benchmarks/results/<device>-<date>-<commit>.json")
    add("--result", type=Path, help="write this file after every case; what it has already is not measured again")
    add("--commit", help="the commit, where there is no git checkout to ask")


class Chosen(NamedTuple):
    """What a run measures: cases with the contenders that can run, in the order in which they are measured."""

    device: Device
    cases: list[Case]
    models: list[Model]
    plan: Plan
    left_out: dict[str, str]  # providers that cannot run here, and why
    seconds: float  # of timing a case
    dtype: str  # of all cases but checks and the host's
    end: float | None = None  # when the run has to end, by the monotonic clock
    commit: str | None = None  # where it was said


def choose(config: pytest.Config) -> Chosen:
    """What the options ask for.

    Raises:
        pytest.UsageError: an unknown name (it lists those there are), a provider that was asked for and cannot run
            (it says why), CUDA where there is none, a number that is no count.
    """
    option = config.getoption
    device = _device(option("device"))
    if (threads := option("threads")) is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    for name in ("seconds", "minutes"):
        if (value := option(name)) is not None and value < 0:
            raise pytest.UsageError(f"--{name} must not be negative, got {value}")
    dtype, limited = option("dtype") or DTYPES[device.kind], option("minutes")
    models = [MODELS[name] for name in _names(option("sizes"), DEFAULT_SIZES[device.kind], MODELS, "--sizes")]
    limited_too = [name for name in GROUPS if name != "tune"]
    default = [name for name in GROUPS if name not in NOT_BY_DEFAULT] if limited is None else limited_too
    groups = _names(option("groups"), ",".join(default), GROUPS, "--groups")
    providers = _names(option("providers"), ",".join(PROVIDERS), PROVIDERS, "--providers")
    left_out = missing(providers, device)
    if option("providers") and left_out:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise pytest.UsageError(f"--providers: cannot run here: {reasons}")
    plan = _plan(PLANS[device.kind], option("tokens"))
    runnable = [name for name in providers if name not in left_out]
    known = [case for model in models for case in table(model, device.kind, dtype, plan) if case.group in groups]
    kept = {case.name: case.keep(runnable) for case in known}  # the host's cases are those of every model
    cases = [case for case in kept.values() if case.contenders]
    if not cases:
        raise pytest.UsageError(
            f"--groups {','.join(groups)} has no case with the providers {', '.join(runnable)}; the operators "
            f"({', '.join(OPERATOR_GROUPS)}) have triton and torch alone"
        )
    if limited is not None:
        cases.sort(key=lambda case: rank(case, plan, dtype)[0])  # stable
    seconds = SECONDS[device.kind] if option("seconds") is None else option("seconds")
    end = None if limited is None else time.monotonic() + 60 * limited
    return Chosen(device, cases, models, plan, left_out, seconds, dtype, end, option("commit"))


def _device(kind: str | None) -> Device:
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        raise pytest.UsageError("--device cuda: PyTorch finds no CUDA device; leave the option out to run on the CPU")
    return CudaDevice() if kind == "cuda" or (kind is None and available) else CpuDevice()


def _names(given: str | None, default: str, known: Iterable[str], option: str) -> list[str]:
    text = default if given is None else given
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"unknown {', '.join(unknown)}" if unknown else "no name"
        raise pytest.UsageError(f"{option}: {what}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _plan(plan: Plan, tokens: str | None) -> Plan:
    """The token counts that were asked for, up to 64 of them as decode."""
    if tokens is None:
        return plan
    try:
        counts = sorted({int(count) for count in tokens.split(",")})
    except ValueError:
        raise pytest.UsageError(f"--tokens takes numbers with commas between them, got {tokens!r}") from None
    if counts[0] < 1:
        raise pytest.UsageError(f"--tokens must be at least 1, got {counts[0]}")
    few = tuple(count for count in counts if count <= max(plan.decode))
    many = tuple(count for count in counts if count > max(plan.decode))
    batch = plan.batch if many and many[-1] % plan.batch == 0 else 1
    return plan._replace(
        decode=few or (counts[0],), prefill=many or (counts[-1],), routing=(), batch=batch, decoder=None, step=None
    )
