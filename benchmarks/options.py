"""The options of `pytest benchmarks`, and the cases that they choose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

from benchmarks.cases import DTYPES, GROUPS, NOT_BY_DEFAULT, OPERATORS, PLANS, Case, Plan, table
from benchmarks.devices import MIN_TURNS, CpuDevice, CudaDevice, Device
from benchmarks.providers import PROVIDERS, missing
from benchmarks.sizes import MODELS, Model
from graphmoe_kernels.cost import DTYPES as KNOWN_DTYPES

DEFAULT_SIZES = {"cpu": "llama-3.2-1b", "cuda": "llama-3-8b"}
SECONDS = {"cpu": 1.0, "cuda": 0.5}


def add_options(parser: pytest.Parser) -> None:
    """Declares them."""
    group = parser.getgroup("GraphMoE benchmarks")
    add = group.addoption
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
    add("--save-results", action="store_true", help="also write benchmarks/results/<device>-<date>-<commit>.json")


class Chosen(NamedTuple):
    """What a run measures.

    Attributes:
        device: where.
        cases: the cases, each with the contenders that can run.
        providers: who can run of those that were asked for.
        profiled: the models whose parts are profiled.
        plan: the token counts.
        left_out: providers that cannot run here, and why.
        seconds: of timing a case.
        dtype: of all cases.
    """

    device: Device
    cases: list[Case]
    providers: list[str]
    profiled: list[Model]
    plan: Plan
    left_out: dict[str, str]
    seconds: float
    dtype: str


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
    dtype = option("dtype") or DTYPES[device.kind]
    models = _names(option("sizes"), DEFAULT_SIZES[device.kind], MODELS, "--sizes")
    default = ",".join(name for name in GROUPS if name not in NOT_BY_DEFAULT)
    groups = _names(option("groups"), default, GROUPS, "--groups")
    providers = _names(option("providers"), ",".join(PROVIDERS), PROVIDERS, "--providers")
    left_out = missing(providers, device)
    if option("providers") and left_out:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise pytest.UsageError(f"--providers: cannot run here: {reasons}")
    if (seconds := option("seconds")) is not None and seconds < 0:
        raise pytest.UsageError(f"--seconds must not be negative, got {seconds}")
    plan = _plan(PLANS[device.kind], option("tokens"))
    runnable = [name for name in providers if name not in left_out]
    cases = []
    for name in models:
        for case in table(MODELS[name], device.kind, dtype, plan):
            kept = case.keep(runnable)
            if case.group in groups and kept.contenders:
                cases.append(kept)
    profiled = [MODELS[name] for name in models] if "profile" in groups else []
    if not cases and not profiled:
        raise pytest.UsageError(
            f"--groups {','.join(groups)} has no case with the providers {', '.join(runnable)}; the operators "
            f"({', '.join(OPERATORS)}) have triton and torch alone"
        )
    seconds = SECONDS[device.kind] if seconds is None else seconds
    return Chosen(device, cases, runnable, profiled, plan, left_out, seconds, dtype)


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
        decode=few or (counts[0],), prefill=many or (counts[-1],), routing=(), batch=batch, decoder=None
    )
