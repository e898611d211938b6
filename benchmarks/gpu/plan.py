"""What a run does, the most important first: what no time is left for is skipped and said so."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.cases import DTYPES
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.checks import check_operator
from benchmarks.gpu.devices import Device
from benchmarks.gpu.document import Document
from benchmarks.gpu.kernels import time_kernels
from benchmarks.gpu.layer_timing import LayerCase, time_layer
from benchmarks.gpu.layers import Layer
from benchmarks.gpu.limits import as_limits, measure_limits
from benchmarks.gpu.operators import OPERATORS, Operator
from benchmarks.gpu.presets import Preset
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
        self._layer: tuple[Sizes, Layer] | None = None

    def layer(self, sizes: Sizes) -> Layer:
        """The layer of these sizes; the last one is kept, as it is large."""
        if self._layer is None or self._layer[0] != sizes:
            self._layer = None
            self.device.release()
            self._layer = sizes, Layer(sizes, self.device)
        return self._layer[1]

    def measure_limits(self) -> None:
        """The device's limits, once."""
        p = self.preset
        self.document.content["limits"] = measure_limits(self.device, p.copy_bytes, p.matrix, p.seconds)

    def check(self, operator: Operator, sizes: Sizes) -> None:
        """An operator against fp64, without timing it."""
        dtype = DTYPES[sizes.dtype]
        operands = operator.operands(sizes, operator.later, dtype, self.device.torch)
        found = check_operator(operator, operands, dtype).record(operator.title, sizes.tokens, dtype)
        self.document.content["checks"].append(found | {"experts": sizes.experts})

    def kernels(self, operator: Operator, sizes: Sizes) -> None:
        """An operator's check and its kernels' times."""
        described = self.document.content["conditions"].get("device", {})
        limits = as_limits(self.document.content["limits"], described.get("multiprocessors", 4))
        found, rows = time_kernels(operator, sizes, self.device, DTYPES[sizes.dtype], limits, self.preset.seconds)
        self.document.content["checks"].append(found)
        self.document.content["kernels"] += rows

    def layers(self, sizes: Sizes, case: LayerCase, names: Sequence[str], step: str) -> None:
        """A layer's providers in one case."""
        layer = self.layer(sizes)
        providers = [layer.provider(name) for name in names]
        checks, rows = time_layer(layer, case, providers, 2 * self.preset.seconds)
        self.document.content["checks"] += checks
        self.document.content["layers"] += [row | {"step": step} for row in rows]


def steps(preset: Preset) -> Iterator[Step]:
    """The whole plan, in order of importance."""
    yield Step("limits", 5, Run.measure_limits)
    for operator in OPERATORS:
        yield _check(operator, preset.test)
    three, main = preset.rounds[0], preset.main
    yield _layer(preset, LayerCase(main), three, ("fused", "dense", "literal", "torch"), 30)
    for tokens in preset.decode[:2]:
        yield _layer(preset, LayerCase(tokens, graph=True), three, ("fused", "dense", "literal", "torch"), 20)
    yield _layer(preset, LayerCase(main, training=True), three, ("fused", "dense", "literal", "torch"), 40)
    for tokens in (main, preset.decode[0]):
        yield from (_kernels(preset, operator, tokens) for operator in OPERATORS)
    yield _layer(preset, LayerCase(main), 1, ("fused", "dense", "torch"), 20)
    yield _layer(preset, LayerCase(preset.decode[0], graph=True), 1, ("fused", "dense", "torch"), 15)
    yield _layer(preset, LayerCase(main, training=True), 1, ("fused", "dense", "torch"), 25)
    yield _layer(preset, LayerCase(main), three, ("fused", "literal compiled", "peer"), 80, "compiled and peer")
    yield _layer(preset, LayerCase(main, training=True), three, ("fused", "literal compiled"), 100, "compiled")
    others = [t for t in (*preset.decode, *preset.prefill) if t not in (main, preset.decode[0])]
    for tokens in others:
        yield from (_kernels(preset, operator, tokens) for operator in OPERATORS)
    for tokens in (main, preset.decode[0]):
        yield from (_kernels(preset, operator, tokens, preset.many) for operator in OPERATORS if operator.name != "gru")
    yield _layer(preset, LayerCase(main), three, ("fused", "dense"), 30, experts=preset.many)
    yield _layer(preset, LayerCase(preset.decode[0], graph=True), three, ("fused", "dense"), 20, experts=preset.many)
    for rounds in preset.rounds:
        for tokens in (*preset.decode, *preset.prefill):
            yield from _grid(preset, tokens, rounds, main)
    yield _layer(preset, LayerCase(preset.decode[0]), three, ("fused", "dense"), 15, "eager")
    if preset.test.dtype == "bf16":
        for dtype in ("fp16", "fp32"):
            yield from (_check(operator, replace(preset.test, dtype=dtype)) for operator in OPERATORS)


def _grid(preset: Preset, tokens: int, rounds: int, main: int) -> Iterator[Step]:
    """The rest of rounds x tokens, inference and training."""
    decode = tokens in preset.decode
    done = tokens == main or (decode and tokens in preset.decode[: 2 if rounds == preset.rounds[0] else 1])
    if rounds not in (preset.rounds[0], 1) or not done:
        yield _layer(preset, LayerCase(tokens, graph=decode), rounds, ("fused", "dense", "torch"), 15)
    if not decode and (tokens != main or rounds not in (preset.rounds[0], 1)):
        yield _layer(preset, LayerCase(tokens, training=True), rounds, ("fused", "dense", "torch"), 20)


def _check(operator: Operator, sizes: Sizes) -> Step:
    name = f"check {operator.title}, {sizes.tokens} tokens, {sizes.dtype}"
    return Step(name, 15, lambda run: run.check(operator, sizes))


def _kernels(preset: Preset, operator: Operator, tokens: int, experts: int | None = None) -> Step:
    sizes = preset.at(tokens, experts=experts)
    name = f"kernels of {operator.title}, {tokens} tokens, {sizes.experts} experts"
    return Step(name, 12, lambda run: run.kernels(operator, sizes))


def _layer(
    preset: Preset,
    case: LayerCase,
    rounds: int,
    names: Sequence[str],
    seconds: float,
    note: str = "",
    experts: int | None = None,
) -> Step:
    sizes = preset.at(1, rounds, experts)
    name = f"layer, {case.mode}, T={rounds}, {case.tokens} tokens, {sizes.experts} experts" + (note and f", {note}")
    return Step(name, seconds, lambda run: run.layers(sizes, case, names, name))


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
