"""One case measured: every contender checked, those that are right timed in turns, and what was found as rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from benchmarks import host
from benchmarks.cases import OPERATOR_GROUPS, Case, Contender
from benchmarks.checks import Verdict, in_a_line
from benchmarks.devices import Device, Samples, repeated
from benchmarks.document import WITHOUT_ROUNDS
from benchmarks.host_profile import split
from benchmarks.kernels import REPLAYS, time_kernels
from benchmarks.layers import Layers
from benchmarks.operators import check_operator, find_operator
from benchmarks.table import TUNING
from benchmarks.timing import LayerTiming, OperatorTiming, Prepared, Timing
from benchmarks.tuning import Cell, tune
from benchmarks.whole import DecoderTiming, GenerationTiming, profiles

TIMINGS: dict[str, Callable[[Case, Layers], Timing]] = {
    **dict.fromkeys(OPERATOR_GROUPS, OperatorTiming),
    **dict.fromkeys(("layer", "step", "rounds", "methods", "scaling", "host"), LayerTiming),
    "decoder": DecoderTiming,
    "model": GenerationTiming,
}
# On a CPU a call is repeated until a turn of it lasts so long: clock and scheduler are coarser than short calls.
SHORTEST_TURN = 2e-3
MAX_REPEATS = 200


@dataclass(frozen=True)
class Found:
    """Of one case: the times of one call by label; the others as the document has them."""

    checks: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Samples] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)

    def fault(self, label: str) -> str | None:
        """Why a contender was not timed."""
        return next((check["fault"] for check in self.checks if check["label"] == label), None)


class Workplace(NamedTuple):
    """Where cases are measured: the layers that one after another computes with, on their device; the run's document,
    with the device's limits if they were measured; and how many seconds the contenders of a case are timed together,
    some turns at least."""

    layers: Layers
    content: dict[str, Any]
    seconds: float


def measure(case: Case, place: Workplace) -> Found:
    """Checks the contenders and times those that pass.

    A contender that fails is in the checks with its error, and has no row: what is wrong gets no time. One that runs
    out of memory, or raises anything else, is there too; the others are timed.
    """
    device, first = place.layers.device, case.contenders[0]
    place.layers.keep(contender.sizes for contender in case.contenders)
    if case.group == "check":
        found = check_operator(find_operator(case.operator, bool(case.later)), case.sizes, device.torch)
        return Found([_record(case, first, found)])
    if case.group == "kernels":
        operator = find_operator(case.operator, bool(case.later))
        found, kernels = time_kernels(operator, case.sizes, device, place.content, place.seconds)
        return Found([_record(case, first, found)], kernels=kernels)
    if case.group == "tune":
        return Found(kernels=tune(Cell(*case.operator.split()), case.sizes, device, TUNING))
    if case.group == "host":
        return (
            host.in_own_process(_on_the_host, case, place.seconds)
            if host.is_stubbed(case)
            else _on_the_host(case, place.seconds)
        )
    return Found(profiles=profiles(case, device)) if case.mode == "profile" else _in_turns(case, place)


def _on_the_host(case: Case, seconds: float) -> Found:
    """A case of the group host; of a profile the shares of the profiled call, of the shortest call without one."""
    with host.alone(case) as device:
        place = Workplace(Layers(device), {"limits": {}}, seconds)
        if case.mode != "profile":
            return _in_turns(case, place)
        timing, found = LayerTiming(case, place.layers), []
        for contender in case.contenders:
            ready = make_ready(timing.prepare(contender), case, device)
            shortest = min(device.in_turns({"": ready.call}, seconds)[""].seconds) / ready.calls
            parts = {part: share * shortest for part, share in split(ready.call).items()}
            named = {"model": case.model.name, "adapter": f"T={contender.sizes.rounds}, {contender.provider}"}
            found.append(named | {"phase": "host", "tokens": 1, "seconds": parts})
        return Found(profiles=found)


def _in_turns(case: Case, place: Workplace) -> Found:
    device = place.layers.device
    timing = (GenerationTiming if case.mode == "generate" else TIMINGS[case.group])(case, place.layers)
    checks, ready = [], {}
    for contender in case.contenders:
        try:
            prepared = timing.prepare(contender)
            found = Verdict({}, None) if prepared.check is None else prepared.check()
            if found.fault is None:
                ready[contender.label] = make_ready(prepared, case, device)
        except Exception as error:  # it gets no time, the others do; a lost device raises in the next lines again
            device.release()
            device.synchronize()
            found = Verdict({}, in_a_line(error))
        if found.fault is not None or prepared.check is not None:
            checks.append(_record(case, contender, found))
    turns = device.in_turns({label: each.call for label, each in ready.items()}, place.seconds)
    samples = {label: turns[label].of_one(each.calls) for label, each in ready.items()}
    return Found(checks, samples, [_row(case, each, samples, place.content) for each in ready.values()])


def make_ready(prepared: Prepared, case: Case, device: Device) -> Prepared:
    """With the call as it is timed, captured or repeated, and its peak memory.

    Raises:
        AssertionError: a captured call gives another result than the one that was checked.
    """
    call, times = prepared.call, 1
    if case.group not in (*OPERATOR_GROUPS, "model", "host"):
        prepared = prepared._replace(peak=device.peak_bytes(call))
    if prepared.capture and device.graphs:
        call = device.capture(call)
        fault = None if prepared.verify is None else prepared.verify(call())
        if fault is not None:
            raise AssertionError(f"in a CUDA graph, {fault}")
        # Started on an idle device: of one replay the host's launch would be a good part.
        times, prepared = REPLAYS, prepared._replace(captured=True)
    elif device.kind == "cpu":
        call()
        start = time.perf_counter()
        call()
        times = max(1, min(MAX_REPEATS, math.ceil(SHORTEST_TURN / (time.perf_counter() - start))))
    return prepared._replace(call=repeated(call, times), calls=times * prepared.calls)


def _record(case: Case, contender: Contender, found: Verdict) -> dict[str, Any]:
    """A check as the document has it."""
    sizes = contender.sizes
    named = {"case": case.name, "provider": contender.provider, "label": contender.label}
    return {**named, "tokens": sizes.tokens, "dtype": sizes.dtype, **found.record()}


def _row(case: Case, ready: Prepared, samples: dict[str, Samples], content: dict[str, Any]) -> dict[str, Any]:
    """As the result document has it."""
    contender, work = ready.contender, ready.work
    own = samples[contender.label]
    row: dict[str, Any] = {
        "case": case.name,
        "group": case.group,
        "model": case.model.name,
        "mode": case.mode,
        "graph": ready.captured,
        "round": None if case.later is None else "later" if case.later else "first",
        "context": case.context,
        "provider": contender.provider,
        "label": contender.label,
        "sizes": asdict(contender.sizes) | ({"rounds": 1} if contender.provider in WITHOUT_ROUNDS else {}),
        "seconds": own.summary() | {"calls a turn": ready.calls},
        "ratios": {other: own.over(theirs) for other, theirs in samples.items() if other != contender.label},
    }
    median = row["seconds"]["median"]
    if ready.peak is not None:
        row["peak bytes"] = ready.peak
    if ready.units is not None:
        row["tokens a second"] = ready.units / median
    if work is not None:
        row["work"] = work._asdict()
    if work is not None and content["limits"]:
        row["limit"] = work.times(content)
        row["share"] = max(row["limit"].values()) / median
    return row
