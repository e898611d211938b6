"""What ``graphmoe data fetch`` does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from graphmoe_cli.runs.terminal import hide_loading_bars
from graphmoe_model.base_models import is_local_model, unpack
from graphmoe_model.fetching import Fetched, fetch
from graphmoe_tables.tasks import DATA_FOLDER, MODELS, TASKS


def fetch_all(names: Sequence[str], to: Path | None, console: Console, *, unpacked: bool = False) -> None:
    """Fetch each in turn, write models out as Transformers saves them if asked to, and print where all is, whose it is
    and how it is used.

    Raises:
        ValueError: as `graphmoe_model.fetching.fetch` and `graphmoe_model.base_models.unpack`. What was fetched before
            it stays.
    """
    for name in names:
        with console.status("") as status:
            done = fetch(name, to, status.update)
            if unpacked and name in MODELS:
                status.update(f"{name}: unpacking {MODELS[name].file}")
                hide_loading_bars()
                unpack(done.folder, MODELS[name].file)
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
        command = f"graphmoe train --model {shlex.quote(str(folder))}"
        if is_local_model(str(folder)):
            return [*lines, f"  use: {command} --data quartz ..."]
        file = f"--gguf-file {MODELS[name].file} --data quartz ..."
        return [*lines, f"  use: {command} {file} (reading it needs pip install 'graphmoe[gguf]')"]
    lines.append("  " + ", ".join(f"{split} {count:,}" for split, count in TASKS[name].splits.items()) + " questions")
    elsewhere = "" if to is None else f"{DATA_FOLDER}={shlex.quote(str(to))} "
    return [*lines, f"  use: {elsewhere}graphmoe train --data {name} ..."]
