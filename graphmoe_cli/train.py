"""``graphmoe train``: its options, which are the fields of a `TrainingRecipe`."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from graphmoe_cli.arguments import PRESET_NAMES, no_bars_in_files, one_line_errors, one_of
from graphmoe_cli.results_folder import results_folder
from graphmoe_tables.data_names import data_named
from graphmoe_tables.recipe import OUTPUT, TrainingRecipe
from graphmoe_tables.recipe_fields import Field, field_of, flag
from graphmoe_tables.recipe_files import RECIPE_FILE, recipe_of

FILE = "Recipe file"
EXTRA = ("trl", "accelerate", "datasets")  # packages of graphmoe[train]


def train(config: Path | None = None, resume: bool = False, **options: Any) -> None:
    """Train an adapter on multiple-choice questions.

    The defaults are the paper's (GraphMoE, Table 2). Every option but
    --resume can stand in a YAML file (--config), under its name with
    underscores; the command line overrules it. The whole recipe is saved
    beside the adapter: --config FOLDER/recipe.yaml repeats the run.

    Under torchrun and accelerate launch the same command trains on many
    devices: torchrun --nproc_per_node 8 -m graphmoe_cli train ...

    Example: graphmoe train --model HuggingFaceTB/SmolLM2-135M --data arc_easy --output arc
    """
    first = int(os.environ.get("RANK", 0)) == 0
    with one_line_errors("train", said=first):
        recipe = recipe_of(options, config)
        check_installed()
        for names, split in ((recipe.data, "train"), (recipe.eval_data or (), "validation")):
            for name in names:
                data_named(name, split)
        no_bars_in_files()
        if not first:
            os.environ.setdefault("TQDM_DISABLE", "1")
        try:
            from rich.console import Console

            from graphmoe_cli.runs import train as runs

            with results_folder(Path(recipe.output), "--output"):
                runs.run(recipe, resume=resume, console=Console(quiet=not first))
        except KeyboardInterrupt as error:
            if first:
                typer.echo(f"graphmoe train: {_interrupted(recipe)}", err=True)
            raise typer.Exit(130) from error  # as shells have it of what Ctrl-C ended


def _interrupted(recipe: TrainingRecipe) -> str:
    """Say how a run that Ctrl-C ended goes on."""
    saved = Path(recipe.output) / RECIPE_FILE
    if not saved.is_file():
        return "interrupted before training began; give the same command again"
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    command = "torchrun ... -m graphmoe_cli train" if launched else "graphmoe train"
    return f"interrupted; go on by {command} --config {shlex.quote(str(saved))} --resume"


def check_installed() -> None:
    """`ValueError` if the packages that training needs are not there."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"training needs {', '.join(missing)}: pip install 'graphmoe[train]'")


def _parameter(name: str, field: Field, default: Any) -> inspect.Parameter:
    """Make the option of a recipe's field; None, where it is not given, leaves it to the file or to the default."""
    kinds: dict[type, Any] = {tuple: list[str], str: str, int: int, float: float, bool: bool}
    help_text = f"{field.help} {PRESET_NAMES}." if name == "preset" else field.help
    shown: Any = field.unset if default is None else ("required" if default in ("", ()) else str(default))
    if field.kind is bool and default is False:
        shown = False
    more: dict[str, Any] = one_of(field.choices) if field.choices else {}
    if "metavar" in more:  # the parser's own type stands for the texts
        more["show_choices"] = False
    info = typer.Option(
        *((f"{flag(name)}/--no-{flag(name)[2:]}",) if field.kind is bool else (flag(name),)),
        help=help_text,
        rich_help_panel=field.panel,
        show_default=shown,
        **more,
    )
    optional: Any = kinds[field.kind] | None
    annotation: Any = Annotated[optional, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _signature() -> inspect.Signature:
    config = typer.Option(help="A YAML file with any of these options.", rich_help_panel=FILE, show_default=False)
    resume = typer.Option(
        "--resume", help="Go on with the run in --output, from its last whole checkpoint.", rich_help_panel=OUTPUT
    )
    own = [
        inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config]
        ),
        inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, resume]),
    ]
    fields = [_parameter(f.name, field_of(f), f.default) for f in dataclasses.fields(TrainingRecipe)]
    return inspect.Signature([*fields, *own])


# Typer reads a function's signature; this one's is the recipe's fields, of which each says itself what it means.
train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {name: p.annotation for name, p in train.__signature__.parameters.items()}  # type: ignore[attr-defined]
