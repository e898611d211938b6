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
from benchmarks.decoders import DecoderTiming
from benchmarks.devices import Call, Device, Samples, repeated
from benchmarks.document import WITHOUT_ROUNDS
from benchmarks.generation import GenerationTiming
from benchmarks.importance import TUNING
from benchmarks.kernels import time_kernels
from benchmarks.layers import Layers
from benchmarks.limits import Limits
from benchmarks.operators import check_operator, find_operator
from benchmarks.profiles import profiles
from benchmarks.timing import LayerTiming, OperatorTiming, Prepared, Timing
from benchmarks.tuning import Cell, tune

TIMINGS: dict[str, Callable[[Case, Layers], Timing]] = {
    **dict.fromkeys(OPERATOR_GROUPS, OperatorTiming),
    **dict.fromkeys(("layer", "rounds", "methods", "scaling", "host"), LayerTiming),
    "decoder": DecoderTiming,
    "model": GenerationTiming,
}
# On a CPU a call is repeated until a turn of it lasts so long: clock and scheduler are coarser than short calls.
SHORTEST_TURN = 2e-3
MAX_REPEATS = 200
# Of a CUDA graph, one behind the other in a turn.
REPLAYS = 10


@dataclass(frozen=True)
class Found:
    """Of one case: the times of one call by label; the others as the document has them."""

    checks: list[dict[str, Any]]
    samples: dict[str, Samples] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)

    def fault(self, label: str) -> str | None:
        """Why a contender was not timed."""
        return next((check["fault"] for check in self.checks if check["label"] == label), None)


class Workplace(NamedTuple):
    """Where cases are measured: the layers that one after another computes with, on their device; what the device can
    do, where that was measured; and how many seconds the contenders of a case are timed together, some turns at least.
    """

    layers: Layers
    limits: Limits | None
    seconds: float

    @property
    def device(self) -> Device:
        """Where the layers lie."""
        return self.layers.device


class Ready(NamedTuple):
    """A contender that passed its check; ``calls`` is how often a turn does what it is timed for."""

    prepared: Prepared
    call: Call
    calls: int
    peak: int | None
    captured: bool = False


def measure(case: Case, place: Workplace) -> Found:
    """Checks the contenders and times those that pass.

    A contender that fails is in the checks with its error, and has no row: what is wrong gets no time. One that runs
    out of memory, or raises anything else, is there too; the others are timed.
    """
    place.layers.keep(contender.sizes for contender in case.contenders)
    if case.group == "check":
        found = check_operator(find_operator(case.operator, bool(case.later)), case.sizes, place.device.torch)
        return Found([_record(case, case.contenders[0], found)])
    if case.group == "kernels":
        assert place.limits is not None
        operator = find_operator(case.operator, bool(case.later))
        found, kernels = time_kernels(operator, case.sizes, place.device, place.limits, place.seconds, REPLAYS)
        return Found([_record(case, case.contenders[0], found)], kernels=kernels)
    if case.group == "tune":
        cell = Cell(*case.operator.split())
        return Found([], kernels=tune(cell, case.sizes, place.device, TUNING, REPLAYS))
    if case.mode == "profile":
        return Found([], profiles=host.profiled(case) if case.group == "host" else profiles(case, place.device))
    if case.mode == "launches stubbed":
        samples = host.stubbed(case, place.seconds)
        rows = [_row(case, contender, samples, host.CALLS) for contender in case.contenders]
        return Found([], samples, rows)
    if case.group == "host":
        with host.one_thread():
            return _in_turns(case, Workplace(Layers(host.device()), None, place.seconds))
    return _in_turns(case, place)


def _in_turns(case: Case, place: Workplace) -> Found:
    device = place.device
    timing = (GenerationTiming if case.mode == "generate" else TIMINGS[case.group])(case, place.layers)
    checks, ready = [], {}
    for contender in case.contenders:
        try:
            prepared = timing.prepare(contender)
            found = prepared.check()
            if found.fault is None:
                ready[contender.label] = make_ready(prepared, case, device)
        except Exception as error:  # it gets no time, the others do; a lost device raises in the next lines again
            device.release()
            device.synchronize()
            found = Verdict({}, in_a_line(error))
        checks.append(_record(case, contender, found))
    turns = device.in_turns({label: each.call for label, each in ready.items()}, place.seconds)
    samples = {label: turns[label].of_one(each.calls) for label, each in ready.items()}
    rows = [_timed_row(case, each, samples, place.limits) for each in ready.values()]
    return Found(checks, samples, rows)


def make_ready(prepared: Prepared, case: Case, device: Device) -> Ready:
    """The call as it is timed: captured, or repeated; and its peak memory.

    Raises:
        AssertionError: a captured call gives another result than the one that was checked.
    """
    peak = None if case.group in (*OPERATOR_GROUPS, "model", "host") else device.peak_bytes(prepared.call)
    if prepared.capture and device.graphs:
        call = device.capture(prepared.call)
        fault = None if prepared.verify is None else prepared.verify(call())
        if fault is not None:
            raise AssertionError(f"in a CUDA graph, {fault}")
        # Started on an idle device: of one replay the host's launch would be a good part.
        return Ready(prepared, repeated(call, REPLAYS), REPLAYS * prepared.calls, peak, captured=True)
    if device.kind != "cpu":
        return Ready(prepared, prepared.call, prepared.calls, peak)
    prepared.call()
    start = time.perf_counter()
    prepared.call()
    repeats = max(1, min(MAX_REPEATS, math.ceil(SHORTEST_TURN / (time.perf_counter() - start))))
    return Ready(prepared, repeated(prepared.call, repeats), repeats * prepared.calls, peak)


def _record(case: Case, contender: Contender, found: Verdict) -> dict[str, Any]:
    """A check as the document has it."""
    sizes = contender.sizes
    named = {"case": case.name, "provider": contender.provider, "label": contender.label}
    return {**named, "tokens": sizes.tokens, "dtype": sizes.dtype, **found.record()}


def _row(case: Case, contender: Contender, samples: dict[str, Samples], calls: int, **more: Any) -> dict[str, Any]:
    """As the result document has it; of ``more`` what is known."""
    label = contender.label
    return {
        "case": case.name,
        "group": case.group,
        "model": case.model.name,
        "mode": case.mode,
        "graph": False,
        "round": None if case.later is None else "later" if case.later else "first",
        "context": case.context,
        "provider": contender.provider,
        "label": label,
        "sizes": asdict(contender.sizes) | ({"rounds": 1} if contender.provider in WITHOUT_ROUNDS else {}),
        "seconds": samples[label].summary() | {"calls a turn": calls},
        "ratios": {other: samples[label].over(theirs) for other, theirs in samples.items() if other != label},
        **{key.replace("_", " "): value for key, value in more.items() if value is not None},
    }


def _timed_row(case: Case, ready: Ready, samples: dict[str, Samples], limits: Limits | None) -> dict[str, Any]:
    prepared, work = ready.prepared, ready.prepared.work
    row = _row(case, prepared.contender, samples, ready.calls, graph=ready.captured, peak_bytes=ready.peak)
    median = row["seconds"]["median"]
    if prepared.units is not None:
        row["tokens a second"] = prepared.units / median
    if work is not None:
        row["work"] = {"bytes": work.bytes, "operations": work.operations}
    if work is not None and limits is not None:
        times = limits.times(work)
        row["limit"] = {name: times[name] for name in ("memory", "matrix")}
        row["share"] = max(row["limit"].values()) / median
    return row
