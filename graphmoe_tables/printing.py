"""Tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

ENOUGH = 10_000  # columns, more than any table has


def print_whole(table: Table, console: Console) -> None:
    """Print a table as wide as it is.

    Rich cuts cells to the terminal's width, or to 80 columns in a file or a pipe, and shortened numbers are wrong ones.
    """
    own = console.width
    console.width = max(own, Measurement.get(console, console.options.update_width(ENOUGH), table).maximum)
    try:
        console.print(table)
    finally:
        console.width = own
