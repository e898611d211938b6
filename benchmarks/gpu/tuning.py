"""The choice of a configuration: every candidate is checked, those that are right are timed, the fastest wins."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.checks import check_operator
from benchmarks.devices import Device
from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.kernels import all_again, launches_of
from benchmarks.operator_timing import copies_for
from benchmarks.operators import OPERATORS, Operands, Operator, with_order
from benchmarks.roofline import CONFIG_NAMES
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import Config, config_table, device_class

# The configuration that is there stays unless another is faster by more than what two runs of it differ.
GAIN = 1.02
# Tokens at which a size class is timed, and others at which the winner has to be right too.
TOKENS = {"skinny": (16, 1), "wide": (4096, 321)}
DTYPES = {"half": (torch.bfloat16, torch.float16), "float": (torch.float32,)}
SECONDS = 0.3


class Cell(NamedTuple):
    """One configuration of a file: operator, kernel, size class, dtype class."""

    operator: str
    kernel: str
    size: str
    dtype: str

    @property
    def name(self) -> str:
        """As the command line and the results write it."""
        return f"{self.operator} {self.kernel} {self.size} {self.dtype}"


class Choice(NamedTuple):
    """What was chosen, and every candidate's time or why it has none."""

    config: Config
    changed: bool
    seconds: list[tuple[Config, float]]
    refused: list[tuple[Config, str]]


def choose(
    current: Config,
    tried: Sequence[Config],
    fault: Callable[[Config], str | None],
    timed: Callable[[Sequence[Config]], Sequence[float]],
    confirmed: Callable[[Config], str | None] = lambda config: None,
    time_left: Callable[[], bool] = lambda: True,
) -> Choice:
    """The fastest right one of ``current`` and ``tried``.

    Args:
        current: tried first; it stays unless another is faster by `GAIN`, or if nothing is right.
        tried: other candidates, in the order in which they are tried while there is time.
        fault: why a candidate may not be used (wrong, does not compile, does not fit), or None: what is asked of
            every candidate before it is timed.
        timed: seconds of several, taken in turns.
        confirmed: as ``fault``, at more sizes and dtypes: what is asked of the winner; if it fails, of the next.
        time_left: whether another candidate may be tried.
    """
    right, refused = [], []
    for config in [current, *(c for c in tried if c != current)]:
        if config != current and not time_left():
            break
        reason = fault(config)
        if reason is None:
            right.append(config)
        else:
            refused.append((config, reason))
    seconds = list(zip(right, timed(right), strict=True)) if right else []
    seconds.sort(key=lambda pair: pair[1])
    of_current = next((s for config, s in seconds if config == current), float("inf"))
    for config, of_config in seconds:
        if config == current or of_current < GAIN * of_config:
            break
        reason = confirmed(config)
        if reason is None:
            return Choice(config, True, seconds, refused)
        refused.append((config, reason))
    return Choice(current, False, seconds, refused)


@contextmanager
def trying(cell: Cell, config: Config, device: str) -> Iterator[None]:
    """Inside, the kernel of ``cell`` is launched with ``config``."""
    entry = config_table(device, cell.operator)[cell.kernel][cell.size]
    before = entry[cell.dtype]
    entry[cell.dtype] = config
    try:
        yield
    finally:
        entry[cell.dtype] = before


def operator_of(cell: Cell) -> Operator:
    """The operator's call that a cell is timed in: a later round's, but for routing, whose first reads most."""
    name = "order" if cell.kernel == "order" else cell.operator
    found = [operator for operator in OPERATORS if operator.name == name]
    return next((o for o in found if o.later == (name not in ("routing", "order"))), found[0])


class Tuner:
    """Checks and times one cell's candidates.

    Args:
        cell: what is tuned.
        sizes: the layer's; tokens and dtype are the cell's.
        device: a CUDA device.
    """

    def __init__(self, cell: Cell, sizes: Sizes, device: Device) -> None:
        self.cell, self.device = cell, device
        self.device_class = device_class(device.torch)
        self.operator = operator_of(cell)
        if cell.kernel.endswith("_wide_rank"):
            sizes = Sizes(**{**vars(sizes), "rank": 64})
        elif cell == ("experts", "forward", "wide", "half"):  # what does not run as a stream
            sizes = Sizes(**{**vars(sizes), "experts": 64})
        self.sizes = sizes
        base = (cell.operator, cell.kernel.removesuffix("_wide_rank"))
        self.kernel = next(name for name, place in CONFIG_NAMES.items() if place == base)

    @property
    def current(self) -> Config:
        """The configuration that is shipped."""
        return config_table(self.device_class, self.cell.operator)[self.cell.kernel][self.cell.size][self.cell.dtype]

    def _operands(self, operator: Operator, tokens: int, dtype: torch.dtype) -> Operands:
        sizes = Sizes(**{**vars(self.sizes), "tokens": tokens})
        return with_order(operator, operator.operands(sizes, operator.later, dtype, self.device.torch))

    def fault(self, config: Config) -> str | None:
        """What is wrong with a candidate in the case that is timed, or None."""
        return self._faults(config, [self.operator], TOKENS[self.cell.size][:1], DTYPES[self.cell.dtype][:1])

    def confirmed(self, config: Config) -> str | None:
        """What is wrong with it at all of the cell's token counts, dtypes and rounds, or None."""
        rounds = [operator for operator in OPERATORS if operator.name == self.operator.name]
        return self._faults(config, rounds, TOKENS[self.cell.size], DTYPES[self.cell.dtype])

    def _faults(
        self, config: Config, rounds: Sequence[Operator], counts: Sequence[int], dtypes: Sequence[torch.dtype]
    ) -> str | None:
        try:
            with trying(self.cell, config, self.device_class):
                for operator, tokens, dtype in itertools.product(rounds, counts, dtypes):
                    operands = self._operands(operator, tokens, dtype)
                    found = check_operator(operator, operands, dtype)
                    if found.fault is not None:
                        return f"{operator.title}, {tokens} tokens, {dtype}: {found.fault}"
            self.device.synchronize()
        except Exception as error:  # does not compile, or takes more than the device has
            self.device.synchronize()  # a lost device raises here: then there is nothing more to try
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        return None

    def timed(self, configs: Sequence[Config]) -> list[float]:
        """Seconds of a launch with each configuration, in turns, on operands that exceed the L2 cache."""
        tokens, dtype = TOKENS[self.cell.size][0], DTYPES[self.cell.dtype][0]
        operands = self._operands(self.operator, tokens, dtype)
        count = min(copies_for(operands, self.device.l2_bytes), 64)
        sets = [{name: t.clone() for name, t in operands.items()} for _ in range(count)]
        calls = {}
        for number, config in enumerate(configs):
            with trying(self.cell, config, self.device_class):
                made = [each for operands in sets for each in launches_of(self.operator, operands)]
            alone = [each for each in made if each.name == self.kernel]
            calls[str(number)] = self.device.capture(partial(all_again, alone))
        found = self.device.in_turns(calls, SECONDS * len(configs))
        return [found[str(number)].summary()["median"] / count for number in range(len(configs))]

    def run(self, seconds: float) -> Choice:
        """The choice, of as many candidates as ``seconds`` allow to check (a third of them is left for timing)."""
        end = time.monotonic() + seconds * 2 / 3
        tried = candidates(self.cell.operator, self.cell.kernel, self.cell.size, self.cell.dtype)
        return choose(self.current, tried, self.fault, self.timed, self.confirmed, lambda: time.monotonic() < end)


def rewrite(folder: Path, device: str, cell: Cell, config: Config) -> Path:
    """Put ``config`` in the cell's place in ``folder``/<device class>/<operator>.json, whose other entries stay."""
    path = folder / device / f"{cell.operator}.json"
    table: dict[str, Any] = json.loads(path.read_text())
    table[cell.kernel][cell.size][cell.dtype] = config
    path.write_text(json.dumps(table, indent=2) + "\n")
    return path
