"""``graphmoe memory``: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from graphmoe_cli.arguments import MODEL_NAMES, PRESET_NAMES, one_line_errors, tell_of_the_hub
from graphmoe_tables.methods import preset_settings
from graphmoe_tables.strategies import STRATEGIES, check_run, check_strategies


def memory(
    model: Annotated[
        str,
        typer.Option(help=f"The base model: {MODEL_NAMES}."),
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(STRATEGIES)}; several of them.",
            show_default="all",
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many, one process on each; single has one.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens on each GPU in one forward.")] = 4096,
    loss_tokens: Annotated[
        int | None,
        typer.Option(
            help="How many of them have a loss: of questions, as graphmoe train has it, one each.", show_default="all"
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help=f"The papers' settings: {PRESET_NAMES}; several of them, or all.",
            show_default="GraphMoEConfig's defaults",
        ),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="LoRA rank.", show_default="the preset's")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds T.", show_default="the preset's")] = None,
    checkpointing: Annotated[
        bool, typer.Option(help="Whether each layer is run again in the backward pass, which saves its activations.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as JSON in place of the table.")] = False,
) -> None:
    """How much memory training takes on each GPU, by what it is for.

    Nothing is downloaded but a model's config.json where --model asks for it,
    and no memory is taken for weights. Of activations, it runs the model's
    own code on tensors that have only shapes.

    Example: graphmoe memory --model llama-3-8b --strategy ddp fsdp2 --gpus 8
    """
    with one_line_errors("memory"):
        check_strategies(strategy or [])
        check_run(gpus, tokens, loss_tokens)
        for name in preset or ():
            if name != "all":
                preset_settings(name)
        tell_of_the_hub(model=model)
        from rich.console import Console

        from graphmoe_cli.runs import memory as runs

        runs.run(
            Console(),
            model=model,
            strategies=strategy or (),
            presets=preset or (),
            settings={name: value for name, value in {"r": r, "rounds": rounds}.items() if value is not None},
            gpus=gpus,
            tokens=tokens,
            loss_tokens=loss_tokens,
            checkpointing=checkpointing,
            as_json=as_json,
        )
