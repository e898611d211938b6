"""Every kernel on its own: checked as the layer runs it, then launched again and again with the arguments it got."""

from __future__ import annotations

from typing import Any

from benchmarks.checks import Verdict
from benchmarks.devices import Call, Device, repeated
from benchmarks.limits import Limits
from benchmarks.operators import Operator, check_operator, launches_of
from benchmarks.timing import COLD_FACTOR, copies_for
from benchmarks.work import KERNELS, kernel_work
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import SKINNY_TOKENS, Launch, device_class


def time_kernels(
    operator: Operator, sizes: Sizes, device: Device, limits: Limits, seconds: float, replays: int
) -> tuple[Verdict, list[dict[str, Any]]]:
    """The operator's verdict, and a row for each of its kernels; no rows where the check failed.

    A kernel's launches on all copies of the operands are one CUDA graph, and a turn replays it ``replays`` times: the
    launch's own latency is not in the time.
    """
    verdict = check_operator(operator, sizes, device.torch)
    if verdict.fault is not None:
        return verdict, []
    operands = operator.operands(sizes, device.torch)
    copies, size = copies_for(operands, device.l2_bytes), sum(t.numel() * t.element_size() for t in operands.values())
    launches: dict[str, list[Launch]] = {}
    for _ in range(copies):
        own = {name: t.clone() for name, t in operands.items()}
        for made in launches_of(operator, sizes, own):
            launches.setdefault(made.name, []).append(made)
    calls = {name: replayed(made, device, replays) for name, made in launches.items()}
    timed = device.in_turns(calls, seconds)
    rows = []
    for name, samples in timed.items():
        row: dict[str, Any] = {
            "operator": operator.name,
            "round": "later" if operator.later else "first",
            "tokens": sizes.tokens,
            "experts": sizes.experts,
            "dtype": sizes.dtype,
            "kernel": name,
            "ordered": operator.name == "experts" and sizes.tokens > SKINNY_TOKENS,
            "seconds": samples.of_one(replays * copies).summary() | {"calls a turn": replays * copies},
            "cold": copies * size >= COLD_FACTOR * device.l2_bytes,
        }
        if name in KERNELS:
            sms, known = limits.multiprocessors, device_class(device.torch)
            work = kernel_work(name, sizes, operator.later, sms=sms, device=known)
            row |= {"work": work._asdict(), "limits": limits.times(work)}
        rows.append(row)
    return verdict, rows


def replayed(launches: list[Launch], device: Device, replays: int) -> Call:
    """The launches as one CUDA graph, ``replays`` times."""

    def all_again() -> None:
        for each in launches:
            each.again()

    return repeated(device.capture(all_again), replays)
