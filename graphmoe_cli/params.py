"""``graphmoe params``: its options, and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from graphmoe_cli.arguments import (
    MODEL_NAMES,
    NO_MODEL,
    PRESET_NAMES,
    expert_counts,
    one_line_errors,
    one_of,
    tell_of_the_hub,
)
from graphmoe_tables.methods import METHODS, PRESETS, preset_settings


def params(
    preset: Annotated[
        list[str] | None,
        typer.Option(help=f"The papers' settings: {PRESET_NAMES}; several of them, or all."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A saved GraphMoE adapter instead: a folder, or a name.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"The base model: {MODEL_NAMES}.",
            show_default="the adapter's own",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(**one_of(METHODS), help="A method with its defaults instead of a preset.")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="LoRA rank.", show_default="the preset's")] = None,
    num_experts: Annotated[
        str | None,
        typer.Option(
            help="Experts per layer: 8, a pattern as 2-4-6-8 for equal groups of layers, or 2,2,4,4 for each layer.",
            show_default="the preset's",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token.", show_default="the preset's")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds T; more than one need a GRU.", show_default="the preset's")
    ] = None,
    dora: Annotated[
        bool | None, typer.Option("--dora/--no-dora", help="DoRA's magnitudes.", show_default="the preset's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of the table.")] = False,
) -> None:
    """How many parameters an adapter trains on a model, in which parts.

    Nothing is downloaded but a model's config.json where --model asks for it,
    and no weights are allocated.

    Example: graphmoe params --preset mixlora graphmoe-mixlora --model llama-3-8b
    """
    with one_line_errors("params"):
        settings: dict[str, Any] = {
            "method": method,
            "r": r,
            "num_experts": None if num_experts is None else expert_counts(num_experts),
            "top_k": top_k,
            "rounds": rounds,
            "use_dora": dora,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        check_params(preset or [], adapter, model, settings)
        tell_of_the_hub(model=model, adapter=adapter)
        from rich.console import Console

        from graphmoe_cli.runs import params as runs

        runs.run(Console(), model=model, presets=preset or [], adapter=adapter, settings=settings, as_json=as_json)


def check_params(presets: Sequence[str], adapter: str | None, model: str | None, settings: Mapping[str, Any]) -> None:
    """Check which options are there together.

    Args:
        settings: those that are fields of a `GraphMoEConfig`, by the field's name.

    Raises:
        ValueError: options that exclude each other, one that is missing, or an unknown preset.
    """
    if adapter is not None:
        if presets or settings:
            given = ["--preset"] * bool(presets) + [_flag(name, value) for name, value in settings.items()]
            raise ValueError(f"--adapter has settings of its own; leave out {', '.join(given)}")
        return
    if not presets and not settings:
        raise ValueError(f"name what to count: --preset (all, {', '.join(PRESETS)}), --adapter or --method")
    if presets and "method" in settings:
        raise ValueError("--method starts from the method's defaults, a --preset has its own method; choose one")
    for name in presets:
        if name != "all":
            preset_settings(name)
    if not model:
        raise ValueError(NO_MODEL)


def _flag(name: str, value: object) -> str:
    if name == "use_dora":
        return "--dora" if value else "--no-dora"
    return f"--{name.replace('_', '-')}"
