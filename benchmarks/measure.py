"""One case measured: every contender checked, those that are right timed in turns, and what was found as rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from benchmarks.cases import OPERATORS, Case, Contender
from benchmarks.decoders import DecoderTiming
from benchmarks.devices import Call, Device, Samples
from benchmarks.document import WITHOUT_ROUNDS
from benchmarks.generation import GenerationTiming
from benchmarks.layer_timing import LayerTiming
from benchmarks.memory import check_fits
from benchmarks.operator_timing import OperatorTiming
from benchmarks.preparation import Prepared
from benchmarks.workplace import Workplace


class Timing(Protocol):
    """What the contenders of one case share: inputs, weights, the oracle's results."""

    def prepare(self, contender: Contender) -> Prepared:
        """A contender ready to be checked and timed; it raises what building it raises."""


TIMINGS: dict[str, Callable[[Case, Workplace], Timing]] = {
    **dict.fromkeys(OPERATORS, OperatorTiming),
    **dict.fromkeys(("layer", "rounds", "methods", "scaling"), LayerTiming),
    "decoder": DecoderTiming,
    "model": GenerationTiming,
}
# On a CPU a call is repeated until a turn of it lasts so long: clock and scheduler are coarser than short calls.
SHORTEST_TURN = 2e-3
MAX_REPEATS = 200
# Of a CUDA graph, one behind the other in a turn.
REPLAYS = 10


class Found(NamedTuple):
    """Of one case.

    Attributes:
        checks: a record for each contender.
        rows: one for each that passed.
        samples: their times by label, of one call.
    """

    checks: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    samples: dict[str, Samples]

    def fault(self, label: str) -> str | None:
        """Why a contender was not timed."""
        return next((check["fault"] for check in self.checks if check["label"] == label), None)


class Ready(NamedTuple):
    """A contender that passed its check; ``calls`` is how often a turn does what it is timed for."""

    prepared: Prepared
    call: Call
    calls: int
    peak: int | None
    captured: bool = False


def measure(case: Case, workplace: Workplace) -> Found:
    """Checks the contenders and times those that pass.

    A contender that fails is in the checks with its error, and has no row: what is wrong gets no time. One that runs
    out of memory, or raises anything else, is there too; the others are timed.

    Raises:
        TooLarge: the whole case does not fit in memory.
    """
    device = workplace.device
    workplace.begin(contender.sizes for contender in case.contenders)
    check_fits(case, device.free_bytes())
    timing = TIMINGS[case.group](case, workplace)
    checks, ready = [], {}
    for contender in case.contenders:
        record: dict[str, Any] = {
            "case": case.name,
            "provider": contender.provider,
            "label": contender.label,
            "tokens": contender.sizes.tokens,
            "dtype": contender.sizes.dtype,
        }
        try:
            prepared = timing.prepare(contender)
            verdict = prepared.check()
            record |= verdict.record()
            if verdict.fault is None:
                made = make_ready(prepared, case, device)
                ready[contender.label] = made
        except Exception as error:  # it gets no time, the others do; a lost device raises in the next lines again
            device.release()
            device.synchronize()
            reason = str(error).strip().splitlines() or ["no message"]
            record |= {"passed": False, "fault": f"{type(error).__name__}: {reason[0]}"}
        checks.append(record)
    turns = device.in_turns({label: each.call for label, each in ready.items()}, workplace.seconds)
    samples = {label: turns[label].of_one(each.calls) for label, each in ready.items()}
    rows = [_row(case, label, each, samples, workplace) for label, each in ready.items()]
    return Found(checks, rows, samples)


def make_ready(prepared: Prepared, case: Case, device: Device) -> Ready:
    """The call as it is timed: captured, or repeated; and its peak memory.

    Raises:
        AssertionError: a captured call gives another result than the one that was checked.
    """
    peak = None if case.group in (*OPERATORS, "model") else device.peak_bytes(prepared.call)
    if prepared.capture and device.graphs:
        call = device.capture(prepared.call)
        fault = None if prepared.verify is None else prepared.verify(call())
        if fault is not None:
            raise AssertionError(f"in a CUDA graph, {fault}")
        # Started on an idle device: of one replay the host's launch would be a good part.
        return Ready(prepared, _repeated(call, REPLAYS), REPLAYS * prepared.calls, peak, captured=True)
    if device.kind != "cpu":
        return Ready(prepared, prepared.call, prepared.calls, peak)
    prepared.call()
    start = time.perf_counter()
    prepared.call()
    repeats = max(1, min(MAX_REPEATS, math.ceil(SHORTEST_TURN / (time.perf_counter() - start))))
    return Ready(prepared, _repeated(prepared.call, repeats), repeats * prepared.calls, peak)


def _repeated(call: Call, times: int) -> Call:
    if times == 1:
        return call

    def repeat() -> None:
        for _ in range(times):
            call()

    return repeat


def _row(case: Case, label: str, ready: Ready, samples: dict[str, Samples], workplace: Workplace) -> dict[str, Any]:
    """As the result document has it."""
    contender, work = ready.prepared.contender, ready.prepared.work
    sizes = asdict(contender.sizes) | ({"rounds": 1} if contender.provider in WITHOUT_ROUNDS else {})
    seconds = samples[label].summary() | {"calls a turn": ready.calls}
    row: dict[str, Any] = {
        "case": case.name,
        "group": case.group,
        "model": case.model.name,
        "mode": case.mode,
        "graph": ready.captured,
        "round": None if case.later is None else "later" if case.later else "first",
        "context": case.context,
        "provider": contender.provider,
        "label": label,
        "sizes": sizes,
        "seconds": seconds,
        "peak bytes": ready.peak,
        "work": None if work is None else work._asdict(),
        "limit": None,
        "share": None,
        "tokens a second": None if ready.prepared.units is None else ready.prepared.units / seconds["median"],
        "ratios": {},
    }
    if work is not None and workplace.limits is not None:
        moved = 0.0 if work.bytes is None else work.bytes / workplace.limits.bandwidth
        row["limit"] = {"memory": moved, "matrix": work.operations / workplace.limits.matrix}
        row["share"] = max(row["limit"].values()) / seconds["median"]
    for other, theirs in samples.items():
        if other != label:
            row["ratios"][other] = samples[label].over(theirs)
    return row
