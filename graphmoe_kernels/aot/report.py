"""Readings as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphmoe_kernels.aot.reading import Reading

# Of a case's configuration the table shows what tuning chooses; the name says the rest.
TUNED = ("BLOCK", "GROUP", "SPLIT", "warps", "stages")

# A table in a file or a pipe has no window to fit into.
UNBOUNDED_WIDTH = 200


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for the table where there is none."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=UNBOUNDED_WIDTH)


def table(readings: Sequence[Reading]) -> Table:
    """A row for each reading; a reading with faults is red.

    in loops: `Reading.spills_in_loops`. warps/SM: warps that a multiprocessor holds at once. waits:
    `Reading.waits_between_loads`.
    """
    made = Table(title=f"Kernels as Triton {readings[0].triton} compiles them" if readings else None)
    for header in ("kernel", "configuration"):
        made.add_column(header, overflow="fold")
    made.add_column("target")
    for header in ("shared KiB", "registers", "spill B", "in loops", "HGMMA", "other MMA", "warps/SM", "waits", "s"):
        made.add_column(header, justify="right")
    for reading in readings:
        made.add_row(*_cells(reading), style="red" if reading.faults else None)
    return made


def _cells(reading: Reading) -> list[str]:
    tuned = " ".join(word for word in reading.configuration.split() if word.startswith(TUNED))
    head = [escape(reading.name), escape(tuned), reading.target]
    if reading.error is not None:
        return [*head, *["–"] * 8, f"{reading.seconds:.1f}"]
    return [
        *head,
        f"{reading.shared_bytes / 1024:.1f}",
        str(reading.registers),
        str(reading.spill_bytes),
        str(reading.spills_in_loops),
        str(reading.hgmma),
        str(reading.hmma + reading.tcgen05 + reading.mfma),
        *("–" if count is None else str(count) for count in (reading.resident_warps, reading.waits_between_loads)),
        f"{reading.seconds:.1f}",
    ]
