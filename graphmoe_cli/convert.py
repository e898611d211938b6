"""``graphmoe convert``: its arguments and options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphmoe_cli.arguments import folder, one_line_errors, one_of
from graphmoe_tables.formats import FORMATS, check_format


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="The folder of an adapter as GraphMoE, MoE-PEFT or PEFT's LoRA saves it.", parser=folder),
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write.", parser=folder)],
    to: Annotated[
        str, typer.Option(**one_of(FORMATS), help=" ".join(f"{name}: {text}." for name, text in FORMATS.items()))
    ] = "graphmoe",
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds T of the GraphMoE adapter to write, with fresh GRUs; for a source of one round alone.",
            show_default="the source's",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that exists.")] = False,
) -> None:
    """Convert a saved adapter from or to another format, or add rounds to it.

    Example: graphmoe convert moe_peft_adapter graphmoe_adapter --rounds 3
    """
    with one_line_errors("convert"):
        check_format(to, rounds)
        from rich.console import Console

        from graphmoe_cli.runs import convert as runs

        runs.run(source, target, to=to, rounds=rounds, overwrite=overwrite, console=Console())
