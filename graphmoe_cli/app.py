"""The commands under their one name."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from graphmoe_cli.analyze import analyze
from graphmoe_cli.arguments import ListCommand
from graphmoe_cli.convert import convert
from graphmoe_cli.data import data
from graphmoe_cli.evaluate import compare, evaluate
from graphmoe_cli.export import export
from graphmoe_cli.memory import memory
from graphmoe_cli.params import params
from graphmoe_cli.profile import profile
from graphmoe_cli.train import train

app = typer.Typer(
    name="graphmoe",
    help="GraphMoE: mixture-of-LoRA-experts layers with self-rethinking.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=ListCommand)(profile)
app.command(cls=ListCommand)(params)
app.command(cls=ListCommand)(memory)
app.command()(convert)
app.command()(export)
app.add_typer(data)
app.command(name="eval", cls=ListCommand)(evaluate)
app.command()(compare)
app.command(cls=ListCommand)(train)
app.add_typer(analyze)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"graphmoe {version('graphmoe')}")
        raise typer.Exit


@app.callback()
def graphmoe(
    version: Annotated[  # its callback shows it
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """GraphMoE: mixture-of-LoRA-experts layers with self-rethinking."""


def main() -> None:
    """Run the command that the process was called with."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        os.environ.setdefault("TERMINAL_WIDTH", "120")  # Typer's; in a pipe it would cut names of options at 80 columns
    elif shutil.get_terminal_size().columns < 100:
        app.rich_markup_mode = None  # Typer's tables would cut names of options; the plain list wraps
    app(prog_name="graphmoe")
