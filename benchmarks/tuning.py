"""`make tune`, the group ``tune``: candidates of a kernel's configuration are checked, and those that are right timed.

The fastest goes into ``graphmoe_kernels/configs/<device class>/``, if it is clearly faster than what is there.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.checks import in_a_line
from benchmarks.devices import CudaDevice, Device
from benchmarks.kernels import REPLAYS, replayed
from benchmarks.operators import OPERATORS, Operator, check_operator, copies_of, launches_of
from benchmarks.processes import count, results
from graphmoe_kernels.backend import forget_answers
from graphmoe_kernels.cost import Sizes
from graphmoe_kernels.launching import CONFIGS, Config, config_table, device_class

# The configuration that is there stays unless another is faster by more than what two runs of it differ.
GAIN = 1.02
# Tokens at which a size class is timed, and others at which the winner has to be right too.
TOKENS = {"token": (1, 2), "skinny": (16, 3), "wide": (4096, 321)}
DTYPES = {"half": ("bf16", "fp16"), "float": ("fp32",)}
SECONDS = 0.3
# Candidates that each of several processes compiles first: about 5 seconds a compilation.
EACH = 4
# Names of configurations beside a kernel's own: for ranks beyond 16, and for an F that no 16 divides.
WIDE_RANK, UNALIGNED = "_wide_rank", "_unaligned"
# What a field of a configuration may be: a matrix instruction takes 16 rows and columns, a warp group 4 or 8 warps.
RANGES = {
    "BLOCK": (16, 256),
    "PARTS": (1, 2),
    "num_warps": (1, 8),
    "num_stages": (1, 4),
    "maxnreg": (128, 255),
    "STAGES": (1, 4),
    "AT_ONCE": (1, 4),
}


class Cell(NamedTuple):
    """One configuration of a file: operator, kernel, size class, dtype class."""

    operator: str
    kernel: str
    size: str
    dtype: str

    @property
    def name(self) -> str:
        """As the command line and the results write it."""
        return " ".join(self)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of `TOKENS`: one kernel is for one or two tokens alone."""
        return TOKENS["token" if self.kernel.startswith("experts_forward_token") else self.size]


class Choice(NamedTuple):
    """What was chosen, and every candidate's time or why it has none."""

    config: Config
    seconds: list[tuple[Config, float]]
    refused: list[tuple[Config, str]]


def candidates(shipped: Config) -> list[Config]:
    """The neighbours of a configuration: each field as it is, halved or doubled, fewest changes first.

    What does not compile, does not fit or is wrong is left out when it is tried. The winner's neighbours are the
    candidates of the next run.
    """
    choices = []
    for name, value in shipped.items():
        low, high = RANGES["BLOCK" if name.startswith("BLOCK") else name]
        steps = (value, value // 2, value * 2)
        if name in ("num_stages", "STAGES"):
            steps = (value, value - 1, value + 1)
        elif name == "maxnreg":
            steps = (value, low, high)
        choices.append([step for step in dict.fromkeys(steps) if step == value or low <= step <= high])
    found = [dict(zip(shipped, values, strict=True)) for values in itertools.product(*choices)]
    return sorted(found, key=lambda config: sum(config[name] != shipped[name] for name in shipped))[1:]


@contextmanager
def trying(cell: Cell, config: Config, device: str) -> Iterator[None]:
    """Inside, the kernel of ``cell`` is launched with ``config``."""
    entry = config_table(device, cell.operator)[cell.kernel][cell.size]
    before = entry[cell.dtype]
    entry[cell.dtype] = config
    forget_answers()
    try:
        yield
    finally:
        entry[cell.dtype] = before
        forget_answers()


def cells() -> list[Cell]:
    """What is shipped for kernels that a layer launches, what matters most first: half precision before float, wide
    ranks and an F that no 16 divides last. Others keep their configurations: `topk_softmax_routing`'s, and the GRU's of
    a width that a layer would have padded."""
    found = [
        Cell(operator, kernel, size, dtype)
        for operator in ("experts", "gru", "routing")
        for kernel, sizes in config_table("sm_90", operator).items()
        for size, dtypes in sizes.items()
        for dtype in dtypes
        if kernel != "routing_topk" and not (operator == "gru" and kernel.endswith(UNALIGNED))
    ]
    return sorted(found, key=lambda cell: (cell.kernel.endswith((WIDE_RANK, UNALIGNED)), cell.dtype != "half"))


def operator_of(cell: Cell) -> Operator:
    """The operator's call that a cell is timed in: a later round's, but for routing, whose first reads most."""
    found = [operator for operator in OPERATORS if operator.name == cell.operator]
    return next(o for o in found if o.later == (cell.operator != "routing"))


class Tuner:
    """Checks and times one cell's candidates, in a layer of ``sizes`` with the cell's tokens and dtype."""

    def __init__(self, cell: Cell, sizes: Sizes, device: Device) -> None:
        self.cell, self.device, self.operator = cell, device, operator_of(cell)
        self.device_class = device_class(device.torch)
        self.kernel = cell.kernel.removesuffix(WIDE_RANK).removesuffix(UNALIGNED)
        if cell.kernel.endswith(WIDE_RANK):
            sizes = replace(sizes, rank=64)
        elif cell.kernel.endswith(UNALIGNED):
            sizes = replace(sizes, intermediate=sizes.intermediate - 8)
        self.sizes = sizes

    @property
    def current(self) -> Config:
        """The configuration that is shipped."""
        return config_table(self.device_class, self.cell.operator)[self.cell.kernel][self.cell.size][self.cell.dtype]

    def launch(self, config: Config) -> None:
        """Run the operator's forward and backward with a configuration, in the case that is timed."""
        sizes = replace(self.sizes, tokens=self.cell.tokens[0], dtype=DTYPES[self.cell.dtype][0])
        with trying(self.cell, config, self.device_class):
            launches_of(self.operator, sizes, self.operator.operands(sizes, self.device.torch))

    def fault(self, config: Config) -> str | None:
        """What is wrong with a candidate in the case that is timed, or None."""
        return self._faults(config, [self.operator], self.cell.tokens[:1], DTYPES[self.cell.dtype][:1])

    def confirmed(self, config: Config) -> str | None:
        """What is wrong with it at all of the cell's token counts, dtypes and rounds, or None."""
        rounds = [operator for operator in OPERATORS if operator.name == self.operator.name]
        return self._faults(config, rounds, self.cell.tokens, DTYPES[self.cell.dtype])

    def _faults(
        self, config: Config, rounds: Sequence[Operator], counts: Sequence[int], dtypes: Sequence[str]
    ) -> str | None:
        try:
            with trying(self.cell, config, self.device_class):
                for operator, tokens, dtype in itertools.product(rounds, counts, dtypes):
                    found = check_operator(operator, replace(self.sizes, tokens=tokens, dtype=dtype), self.device.torch)
                    if found.fault is not None:
                        return f"{operator.title}, {tokens} tokens, {dtype}: {found.fault}"
            self.device.synchronize()
        except Exception as error:  # does not compile, or takes more than the device has
            self.device.synchronize()  # a lost device raises here: then there is nothing more to try
            return in_a_line(error)
        return None

    def timed(self, configs: Sequence[Config]) -> list[float]:
        """Seconds of a launch with each configuration, in turns, on operands that exceed the L2 cache."""
        sizes = replace(self.sizes, tokens=self.cell.tokens[0], dtype=DTYPES[self.cell.dtype][0])
        sets, _ = copies_of(self.operator.operands(sizes, self.device.torch), self.device.l2_bytes, most=64)
        calls = {}
        for number, config in enumerate(configs):
            with trying(self.cell, config, self.device_class):
                made = [each for own in sets for each in launches_of(self.operator, sizes, own)]
            alone = [each for each in made if each.name == self.kernel]
            if not alone:
                raise RuntimeError(f"{self.cell.name}: no launch of it among {', '.join({each.name for each in made})}")
            calls[str(number)] = replayed(alone, self.device)
        found = self.device.in_turns(calls, SECONDS * len(configs))
        return [found[str(number)].summary()["median"] / (REPLAYS * len(sets)) for number in range(len(configs))]

    def choose(self, tried: Sequence[Config], time_left: Callable[[], bool]) -> Choice:
        """The fastest right one of the shipped configuration and of those that are ``tried`` while there is time.

        What is shipped stays unless another is faster by `GAIN`, or if nothing is right. `fault` is asked of every
        candidate before it is timed, `confirmed` of the winner; if that fails, of the next.
        """
        current, right, refused = self.current, [], []
        for config in [current, *(c for c in tried if c != current)]:
            if config != current and not time_left():
                break
            reason = self.fault(config)
            if reason is None:
                right.append(config)
            else:
                refused.append((config, reason))
        seconds = list(zip(right, self.timed(right), strict=True)) if right else []
        seconds.sort(key=lambda pair: pair[1])
        of_current = next((s for config, s in seconds if config == current), float("inf"))
        for config, of_config in seconds:
            if config == current or of_current < GAIN * of_config:
                break
            reason = self.confirmed(config)
            if reason is None:
                return Choice(config, seconds, refused)
            refused.append((config, reason))
        return Choice(current, seconds, refused)


def compile_one(cell: Cell, sizes: Sizes, config: Config) -> str | None:
    """Launch a candidate, by which Triton's cache on disk gets it; why it cannot be launched, or None."""
    device = CudaDevice()
    try:
        Tuner(cell, sizes, device).launch(config)
        device.synchronize()
    except Exception as error:  # does not compile, or takes more than the device has
        return in_a_line(error)
    finally:
        device.release()
    return None


def rewrite(folder: Path, device: str, cell: Cell, config: Config) -> None:
    """Put ``config`` in the cell's place in ``folder``/<device class>/<operator>.json, whose other entries stay."""
    path = folder / device / f"{cell.operator}.json"
    table: dict[str, Any] = json.loads(path.read_text())
    table[cell.kernel][cell.size][cell.dtype] = config
    path.write_text(json.dumps(table, indent=2) + "\n")


def tune(cell: Cell, sizes: Sizes, device: Device, seconds: float) -> list[dict[str, Any]]:
    """Choose a cell's configuration, rewrite its file if another is faster, and give a row for every candidate.

    On a GPU several processes compile candidates beside each other, and the checks find them in Triton's cache; what
    cannot be launched is refused then. Of the others as many are checked as ``seconds`` allow (a third of them is left
    for timing).
    """
    tuner, end = Tuner(cell, sizes, device), time.monotonic() + seconds * 2 / 3
    shipped = tuner.current
    refused: list[tuple[Config, str]] = []
    tried = candidates(shipped)
    if isinstance(device, CudaDevice):
        tried = tried[: EACH * count()]
        reasons = results(compile_one, ((cell, sizes, config) for config in tried), lost=None)
        judged = list(zip(tried, reasons, strict=True))
        refused = [(config, reason) for config, reason in judged if reason is not None]
        tried = [config for config, reason in judged if reason is None]
    choice = tuner.choose(tried, lambda: time.monotonic() < end)
    refused += choice.refused
    if choice.config != shipped:
        rewrite(CONFIGS, tuner.device_class, cell, choice.config)
    base: dict[str, Any] = {"operator": cell.operator, "kernel": cell.name}
    base |= {"round": "later" if tuner.operator.later else "first"}
    base |= {"tokens": cell.tokens[0], "experts": tuner.sizes.experts, "dtype": DTYPES[cell.dtype][0]}
    rows: list[dict[str, Any]] = [
        {**base, "config": config, "chosen": config == choice.config, "seconds": {"median": of_config}}
        for config, of_config in choice.seconds
    ]
    untimed = {**base, "seconds": {"median": None}}
    return [*rows, *({**untimed, "config": config, "refused": reason} for config, reason in refused)]
