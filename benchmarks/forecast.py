"""What a layer starts on a device, forward and backward, and how long each of that should take."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.latency import LAUNCH, RAMP, Device, Readings, Time, step_time
from benchmarks.work import FROZEN
from graphmoe_kernels.aot.reading import read_readings
from graphmoe_kernels.aot.trace import Step, traced
from graphmoe_kernels.cost import Sizes, Term, round_terms
from graphmoe_kernels.launching import Launch
from graphmoe_kernels.meta_layer import built_fold, inference, layer_weights, training_step

FOLDER = Path(__file__).parent
LLAMA = Sizes(4096, 14336, 409, experts=8, top_k=2, rank=16, dtype="bf16")
PREFILL, DECODE, TRAINING = (512, 2048, 8192), (1, 16, 64), (2048, 8192)
EXPERTS, ROUNDS = (8, 64), (1, 2, 3)
# What an H100 measured of others, in microseconds, beside what this page would have said (commit 387fd8a's results).
OTHERS = (
    ("dense MLP, inference, 8192 tokens", "dense", 8192, 1, False, 3958.35),
    ("dense MLP, inference in a graph, 16 tokens", "dense", 16, 1, False, 137.11),
    ("dense MLP, inference in a graph, 1 token", "dense", 1, 1, False, 133.46),
    ("dense MLP, training step, 8192 tokens", "dense", 8192, 1, True, 8567.6),
    ("peer_mixlora, inference, 8192 tokens, T=3", "peers", 8192, 3, False, 36008.66),
    ("peer_mixlora, training step, 8192 tokens, T=3", "peers", 8192, 3, True, 96464.27),
)
# Seconds of the host for each thing that is started eagerly: 1,172.8 us for the 17 of T = 3 at one token, 141.7 us for
# the four of the dense MLP (results/cpu-2026-11-26T093120-e2212af28f.json, launches stubbed at the driver).
HOST = {"ours": 1172.8e-6 / 17, "dense": 141.7e-6 / 4}


class Part(NamedTuple):
    """Some of what a layer starts: its name, how often, and all of its time."""

    name: str
    times: int
    seconds: float
    limit: str


class Traced(NamedTuple):
    """What one call of a layer starts: the forward and its backward, and what builds the fold beside the tokens."""

    steps: tuple[Step, ...]
    of_tokens: tuple[bool, ...]


@functools.cache
def readings(device_class: str) -> Readings:
    """The committed readings of a device class."""
    path = FOLDER / f"aot_{device_class}.json"
    return Readings(read_readings(path), path.relative_to(FOLDER.parent), device_class)


@functools.cache
def trace(sizes: Sizes, training: bool, device_class: str) -> Traced:
    """What a folded layer starts with adapters in bf16 (inference) or fp32 (training, where PEFT has them so)."""
    with traced(device_class) as steps:
        weights = layer_weights(sizes, torch.float32 if training else torch.bfloat16)
        if training:
            training_step(sizes, weights, "auto")
        else:
            fold = built_fold(sizes, weights)
            steps.clear()
            inference(sizes, weights, fold)
    kept = [step for step, after in zip(steps, [*steps[1:], None], strict=True) if not _counters(step, after)]
    return Traced(tuple(kept), tuple(isinstance(step, Launch) or sizes.tokens in step.sizes for step in kept))


def _counters(step: Step, after: Step | None) -> bool:
    """Whether it makes the counters of the launch after it, which outside a trace are kept from call to call."""
    counting = isinstance(after, Launch) and "counters" in after.arguments
    return counting and not isinstance(step, Launch) and step.name == "zeros"


@functools.cache
def times(sizes: Sizes, training: bool, device: Device) -> tuple[Time, ...]:
    """How long each step of `trace` takes."""
    steps = trace(sizes, training, device.device_class).steps
    return tuple(step_time(step, device, readings(device.device_class), sizes) for step in steps)


def ours(sizes: Sizes, training: bool, device: Device) -> float:
    """Seconds of the folded layer."""
    return sum(time.seconds for time in times(sizes, training, device))


@functools.cache
def others(form: str, sizes: Sizes, training: bool, device: Device) -> float:
    """Seconds of another form by the terms of the cost model: each starts once and moves its tensors once.

    In training a product costs another for the gradient of its input, and a third for that of a trained weight;
    pointwise work twice its bytes once more. So it is a floor: of the literal loop what torch.compile could reach, of a
    peer less than its eager operations take. What the compiled loop's products give for each slot, [N, F] for gate and
    up, they write and its pointwise work reads: torch.compile fuses nothing with a product of cuBLAS.
    """
    slots = 2 * sizes.top_k * sizes.intermediate * sizes.element
    given = [Term("what the products of the slots give", read=slots, written=slots)] if form == "literal" else []
    count, found = "executed" if form == "literal" else "needed", 0.0
    for t in range(1, sizes.rounds + 1):
        for term in [*round_terms(form, sizes, t, count), *given]:
            moved = float(term.weights + sizes.tokens * (term.read + term.written))
            seconds, again = moved / device.copy, 2
            if term.multiply_adds:
                seconds = device.product_seconds(2.0 * sizes.tokens * term.multiply_adds, moved)
                again = 1 if term.name in FROZEN else 2
            found += (seconds + LAUNCH + RAMP) * (1 + again * training)
    return found


def parts(sizes: Sizes, training: bool, device: Device) -> list[Part]:
    """What takes most of a layer's time: kernels by name, products by their shape, all other operations together."""
    count: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    limits: dict[str, str] = {}
    steps = trace(sizes, training, device.device_class).steps
    for step, time in zip(steps, times(sizes, training, device), strict=True):
        name = _named(step)
        count[name] += 1
        seconds[name] = seconds.get(name, 0.0) + time.seconds
        limits[name] = time.limit
    largest = sorted(seconds, key=lambda name: -seconds[name])
    return [Part(name, count[name], seconds[name], limits[name]) for name in largest]


def _named(step: Step) -> str:
    if isinstance(step, Launch):
        return step.name
    if step.product is None:
        return "copies, casts, sums"
    rows, inner, columns, _ = step.product
    return f"product [{rows}, {inner}] x [{inner}, {columns}]"
