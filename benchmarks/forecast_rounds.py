"""What all launches of a kernel in one round should take together: what a result measures of a kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from benchmarks.forecast import EXPERTS, LLAMA, times, trace
from benchmarks.latency import Device, Time
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import Launch

# Tokens, and whether a training step is folded: a kernel is then launched in the backward too.
CASES = ((1, False), (16, False), (64, False), (512, True), (8192, True))
INTRODUCTION = """## Kernels of a round on an H100

All launches of a kernel in one round, forward and backward (up to 64 tokens the forward alone), together: a round is
done in as many pieces as H M^T, and tokens are put in order for the backward again. This is what stands beside a
result, which times them together. A later round is what a fourth one adds to three.

| kernel | tokens | n | launches | us | limit |
| --- | ---: | ---: | ---: | ---: | ---: |
"""


class Round(NamedTuple):
    """A kernel's launches in one round: the kernel, "first" or "later", and how long each should take."""

    kernel: str
    which: str
    times: tuple[Time, ...]


def rounds(sizes: Sizes, training: bool, device: Device) -> Iterator[Round]:
    """Give every kernel of a layer in its first round and in a later one; the rounds of ``sizes`` are not read.

    What a kernel has in a layer of the fewest rounds that launch it is its first round: the GRU runs from two rounds
    on. A later round is what a fourth adds to three: a training step of 512 tokens is folded from three rounds on.
    """
    one, two, three, four = (_launches(replace(sizes, rounds=count), training, device) for count in (1, 2, 3, 4))
    for kernel, all_launches in four.items():
        first = next(found[kernel] for found in (one, two) if kernel in found)
        yield Round(kernel, "first", tuple(first.elements()))
        yield Round(kernel, "later", tuple((all_launches - three[kernel]).elements()))


def _launches(sizes: Sizes, training: bool, device: Device) -> dict[str, Counter[Time]]:
    found: dict[str, Counter[Time]] = {}
    steps = trace(sizes, training, device.device_class).steps
    for step, time in zip(steps, times(sizes, training, device), strict=True):
        if isinstance(step, Launch):
            found.setdefault(step.name, Counter())[time] += 1
    return found


def section(device: Device) -> str:
    """Return the page's section of them."""
    lines = []
    for experts in EXPERTS:
        for tokens, training in CASES:
            for kernel, which, launches in rounds(replace(LLAMA, tokens=tokens, experts=experts), training, device):
                seconds, limit = sum(time.seconds for time in launches), max(launches).limit
                cells = f"{kernel}, {which} round", tokens, experts, len(launches), f"{1e6 * seconds:,.1f}", limit
                lines.append(f"| {' | '.join(map(str, cells))} |\n")
    return INTRODUCTION + "".join(lines)
