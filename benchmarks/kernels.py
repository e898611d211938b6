"""Every kernel on its own: checked as the layer runs it, then launched again and again with the arguments it got."""

from __future__ import annotations

from typing import Any

from benchmarks.checks import Verdict
from benchmarks.devices import Call, Device, repeated
from benchmarks.operators import Operator, check_operator, copies_of, launches_of
from benchmarks.work import kernel_work
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import Launch

# Of a CUDA graph, one behind the other in a turn.
REPLAYS = 10


def time_kernels(
    operator: Operator, sizes: Sizes, device: Device, content: dict[str, Any], seconds: float
) -> tuple[Verdict, list[dict[str, Any]]]:
    """The operator's verdict, and a row for each of its kernels; no rows where the check failed.

    A kernel's launches on all copies of the operands are one CUDA graph, and a turn replays it `REPLAYS` times: the
    launch's own latency is not in the time. ``content`` has the limits of the run.
    """
    verdict = check_operator(operator, sizes, device.torch)
    if verdict.fault is not None:
        return verdict, []
    sets, cold = copies_of(operator.operands(sizes, device.torch), device.l2_bytes)
    calls = [launches_of(operator, sizes, own) for own in sets]
    by_kernel = {
        name: [launch for made in calls for launch in made if launch.name == name]
        for name in dict.fromkeys(launch.name for launch in calls[0])
    }
    timed = device.in_turns({name: replayed(made, device) for name, made in by_kernel.items()}, seconds)
    rows = []
    for name, samples in timed.items():
        work = kernel_work([launch for launch in calls[0] if launch.name == name], sizes, operator.later)
        row = {
            "operator": operator.name,
            "round": "later" if operator.later else "first",
            "tokens": sizes.tokens,
            "experts": sizes.experts,
            "dtype": sizes.dtype,
            "kernel": name,
            "seconds": samples.of_one(REPLAYS * len(sets)).summary() | {"calls a turn": REPLAYS * len(sets)},
            "cold": cold,
        }
        rows.append(row | {"work": work._asdict(), "limits": work.times(content)})
    return verdict, rows


def replayed(launches: list[Launch], device: Device) -> Call:
    """The launches as one CUDA graph, `REPLAYS` times."""

    def all_again() -> None:
        for each in launches:
            each.again()

    return repeated(device.capture(all_again), REPLAYS)
