"""What ``graphmoe data fetch`` does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from graphmoe_model.fetching import Fetched, fetch
from graphmoe_tables.tasks import DATA_FOLDER, MODELS, TASKS


def fetch_all(names: Sequence[str], to: Path | None, console: Console) -> None:
    """Fetch each in turn, and print where it is, whose it is and how it is used.

    Raises:
        ValueError: as `graphmoe_model.fetching.fetch`. What was fetched before it stays.
    """
    for name in names:
        with console.status("") as status:
            done = fetch(name, to, status.update)
        for line in _lines(done, to):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(done: Fetched, to: Path | None) -> list[str]:
    name, folder = done.name, done.folder
    row = TASKS[name] if name in TASKS else MODELS[name]
    lines = [
        f"{name}: {row.title}, in {folder}{'' if done.new else ' (was there, checked)'}",
        f"  from {row.origin}, by the {row.source}; licence {row.licence}",
    ]
    if name in MODELS:
        file = MODELS[name].file
        command = f"graphmoe train --model {shlex.quote(str(folder))} --gguf-file {file} --data quartz ..."
        return [*lines, f"  use: {command} (reading it needs pip install 'graphmoe[gguf]')"]
    lines.append("  " + ", ".join(f"{split} {count:,}" for split, count in TASKS[name].splits.items()) + " questions")
    elsewhere = "" if to is None else f"{DATA_FOLDER}={shlex.quote(str(to))} "
    return [*lines, f"  use: {elsewhere}graphmoe train --data {name} ..."]
