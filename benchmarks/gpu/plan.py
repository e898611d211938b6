"""What a run does, the most important first: what no time is left for is skipped and said so."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.cases import Case, table
from benchmarks.checks import check_operator
from benchmarks.devices import Device
from benchmarks.document import WITHOUT_ROUNDS, Document
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.kernels import time_kernels
from benchmarks.gpu.presets import Preset
from benchmarks.layers import DTYPES
from benchmarks.limits import as_limits, measure_limits
from benchmarks.measure import measure
from benchmarks.memory import TooLarge
from benchmarks.operators import OPERATORS, Operator
from benchmarks.profiles import profiles
from benchmarks.providers import PROVIDERS, missing
from benchmarks.roofline import Limits
from benchmarks.workplace import Workplace
from graphmoe_kernels.cost import Sizes

# Words of errors after which a device takes no more work: another process has to go on.
LOST = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")


class DeviceLost(Exception):
    """The device takes no more work in this process."""


class Step(NamedTuple):
    """A part of the run, named uniquely; ``seconds`` is what it may take: with less left it is skipped."""

    name: str
    seconds: float
    run: Callable[[Run], None]


class Run:
    """What the steps share.

    Args:
        preset: the sizes.
        device: where it runs.
        document: what is written.
        budget: how long it may take.
    """

    def __init__(self, preset: Preset, device: Device, document: Document, budget: Budget) -> None:
        self.preset, self.device, self.document, self.budget = preset, device, document, budget
        self._workplace: Workplace | None = None
        self._left_out = missing(PROVIDERS, device)
        document.content["conditions"]["left out"] = self._left_out

    def measure_limits(self) -> None:
        """The device's limits, once."""
        p = self.preset
        found = measure_limits(self.device, p.copy_bytes, p.matrix, p.seconds, p.dtype)
        self.document.content["limits"] = found

    def limits(self) -> Limits:
        """Those of the document, which an earlier process may have measured."""
        described = self.document.content["conditions"].get("device", {})
        return as_limits(self.document.content["limits"], described.get("multiprocessors", 4))

    def check(self, operator: Operator, sizes: Sizes) -> None:
        """An operator against fp64, without timing it."""
        dtype = DTYPES[sizes.dtype]
        operands = operator.operands(sizes, operator.later, dtype, self.device.torch)
        self._record(operator, sizes, check_operator(operator, operands, dtype).record())

    def kernels(self, operator: Operator, sizes: Sizes) -> None:
        """An operator's check and its kernels' times."""
        dtype = DTYPES[sizes.dtype]
        found, rows = time_kernels(operator, sizes, self.device, dtype, self.limits(), self.preset.seconds)
        self._record(operator, sizes, found.record())
        self.document.content["kernels"] += rows

    def _record(self, operator: Operator, sizes: Sizes, record: dict[str, Any]) -> None:
        case = f"{operator.title}, n={sizes.experts}"
        self.document.content["checks"].append(
            {"case": case, "provider": "triton", "label": "triton", "tokens": sizes.tokens, "dtype": sizes.dtype}
            | record
        )

    def case(self, case: Case) -> None:
        """A case of the table, with the providers that can run.

        Raises:
            TooLarge: it does not fit in memory.
        """
        if self._workplace is None:
            self._workplace = Workplace(self.device, self.limits(), self.preset.seconds, self.preset.plan)
        found = measure(case.keep([name for name in PROVIDERS if name not in self._left_out]), self._workplace)
        self.document.content["checks"] += found.checks
        self.document.content["rows"] += found.rows

    def profile(self) -> None:
        """Where the time of a small whole model goes."""
        p = self.preset
        self.document.content["profiles"] = profiles(p.model, self.device, p.dtype, p.plan, list(PROVIDERS))


class Stage(NamedTuple):
    """Cases that come next, and how many seconds one of them may take."""

    seconds: float
    chosen: Callable[[Case, Sizes], bool]


PROFILE = Stage(60, lambda case, s: False)


def _stages(preset: Preset) -> Iterator[Stage | tuple[int, ...]]:
    """The order of the cases; numbers are tokens at which the kernels alone are timed in between."""
    main, first, compiled = preset.plan.main, preset.plan.decode[0], "against torch.compile"

    def layer(mode: str, rounds: int, *tokens: int, note: str = "") -> Callable[[Case, Sizes], bool]:
        return lambda case, s: (
            (case.group, case.mode, s.rounds, case.note) == ("layer", mode, rounds, note) and s.tokens in tokens
        )

    yield Stage(30, layer("inference", 3, main))
    yield Stage(25, layer("inference", 3, *preset.plan.decode[:2]))
    yield Stage(50, layer("training", 3, main))
    yield Stage(20, lambda case, s: case.group == "decoder")
    yield Stage(10, lambda case, s: case.group == "routing" and s.tokens in (first, *preset.plan.routing, main))
    yield Stage(20, layer("inference", 1, main, first))
    yield Stage(70, layer("inference", 3, main, note=compiled))
    yield Stage(90, layer("training", 3, main, note=compiled))
    yield (main, first)
    yield Stage(30, layer("training", 1, main))
    yield Stage(60, lambda case, s: case.group == "rounds")
    yield Stage(30, lambda case, s: case.group == "model")
    yield PROFILE
    yield Stage(15, lambda case, s: case.group in ("expert_swiglu", "gru_step") and s.tokens in (first, main))
    yield Stage(40, lambda case, s: case.group == "methods")
    yield Stage(20, lambda case, s: case.group == "scaling")
    yield tuple(tokens for tokens in preset.plan.tokens if tokens not in (main, first))
    yield Stage(15, lambda case, s: True)


def steps(preset: Preset, kind: str) -> Iterator[Step]:
    """The whole plan for a kind of device, in order of importance."""
    yield Step("limits", 5, Run.measure_limits)
    for operator in OPERATORS:
        yield _check(operator, preset.test)
    left = list(table(preset.model, kind, preset.dtype, preset.plan))
    for stage in _stages(preset):
        if not isinstance(stage, Stage):
            for tokens in stage:
                yield from (_kernels(preset, operator, tokens) for operator in OPERATORS)
            continue
        if stage is PROFILE:
            yield Step("profile", stage.seconds, Run.profile)
        chosen = [case for case in left if stage.chosen(case, _sizes(case))]
        left = [case for case in left if case not in chosen]
        for case in chosen:
            yield Step(case.name, stage.seconds, lambda run, case=case: run.case(case))  # type: ignore[misc]
    for tokens in (preset.plan.main, preset.plan.decode[0]):
        yield from (_kernels(preset, operator, tokens, preset.many) for operator in OPERATORS if operator.name != "gru")
    if preset.test.dtype == "bf16":
        for dtype in ("fp16", "fp32"):
            yield from (_check(operator, replace(preset.test, dtype=dtype)) for operator in OPERATORS)


def _sizes(case: Case) -> Sizes:
    """Of the contenders that have rounds."""
    return next((c.sizes for c in case.contenders if c.provider not in WITHOUT_ROUNDS), case.contenders[0].sizes)


def _check(operator: Operator, sizes: Sizes) -> Step:
    name = f"check {operator.title}, {sizes.tokens} tokens, {sizes.dtype}"
    return Step(name, 15, lambda run: run.check(operator, sizes))


def _kernels(preset: Preset, operator: Operator, tokens: int, experts: int | None = None) -> Step:
    sizes = preset.at(tokens, experts=experts)
    name = f"kernels of {operator.title}, {tokens} tokens, {sizes.experts} experts"
    return Step(name, 12, lambda run: run.kernels(operator, sizes))


def run_steps(run: Run, plan: Sequence[Step], say: Callable[[str], None] = print) -> None:
    """Run what the budget allows; every step's end is on disk before the next begins.

    Raises:
        DeviceLost: a step left the device unusable; what was found until then is saved.
    """
    document = run.document
    for step in plan:
        if document.attempted(step.name):
            continue
        if not run.budget.allows(step.seconds):
            document.end(step.name, "skipped", note=f"{run.budget.left():.0f} s left, it may take {step.seconds:.0f}")
            continue
        document.begin(step.name)
        start = time.perf_counter()
        try:
            step.run(run)
            run.device.synchronize()
        except TooLarge as error:
            document.end(step.name, "skipped", note=str(error))
            say(f"{run.budget.used():6.1f} s  skipped {step.name}: {error}")
            continue
        except Exception as error:
            note = _note(error)
            document.end(step.name, "failed", time.perf_counter() - start, note)
            say(f"{run.budget.used():6.1f} s  FAILED  {step.name}: {note}")
            if any(word in str(error) for word in LOST):
                raise DeviceLost(step.name) from error
            run.device.release()
            continue
        run.device.release()  # graphs keep memory of their own until they are collected
        document.end(step.name, "done", time.perf_counter() - start)
        say(f"{run.budget.used():6.1f} s  {step.name}")


def _note(error: Exception) -> str:
    """The error in a line, and where it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message: Any = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message[:300]} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"
