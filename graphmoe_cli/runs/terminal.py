"""What commands share that write files and show how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers.utils import logging

from graphmoe_cli.pictures import NO_MATPLOTLIB


def hide_loading_bars() -> None:
    """Leave out Transformers' bars of loading where there is no terminal: a file is no place for them."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how many of how many are done, which the function is told."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(what), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say_written(out: Path, files: Sequence[str], plot: bool | None, console: Console) -> None:
    """Say which files are in a folder, and why there are no pictures where nobody ruled them out."""
    console.print(Text(f"Written into {out}: {', '.join(files)}"), soft_wrap=True)
    if plot is None and not any(file.endswith(".png") for file in files):
        console.print(Text(f"No pictures: {NO_MATPLOTLIB}."), soft_wrap=True)
