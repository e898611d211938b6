"""``graphmoe profile``: its options."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from graphmoe_cli.arguments import folder, one_line_errors, one_of, tell_of_the_hub
from graphmoe_cli.profile_options import ProfileOptions
from graphmoe_cli.results_folder import results_folder
from graphmoe_tables.methods import METHODS
from graphmoe_tables.models import MODEL_SHAPES


class Phase(StrEnum):
    """What of a generation is profiled (Typer takes lists of enumerations, not of Literals)."""

    prefill = "prefill"
    decode = "decode"


PHASES = list(Phase)
LENGTHS = list(ProfileOptions.seq)
PUBLISHED = [name for name in MODEL_SHAPES if name != "tiny"]


def profile(
    model: Annotated[str | None, typer.Option(help="A Transformers model: its name on the hub, or a folder.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Random weights in place of a model, so nothing is downloaded: tiny, or a few layers of the real "
            f"sizes of {', '.join(PUBLISHED)} (fewer layers than the model's make "
            "'other' larger)."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="How many layers the preset has.", show_default="2 or 4")] = None,
    adapter: Annotated[str | None, typer.Option(help="A saved adapter of the model: a folder, or a name.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            **one_of(METHODS, {"graphmoe": "GraphMoE is mixlora with --rounds 3"}),
            help="Fresh adapters by their base method, at its published sizes: several of them.",
            show_default="mixlora",
        ),
    ] = None,
    rounds: Annotated[
        list[int] | None,
        typer.Option(
            help="Their rounds T: 0 is no adapter, 1 the base method, more GraphMoE on it. LoRA is there once.",
            show_default="0 1 3; with --adapter alone none",
        ),
    ] = None,
    seq: Annotated[list[int], typer.Option(help="Sequence lengths in tokens.")] = LENGTHS,
    phase: Annotated[
        list[Phase],
        typer.Option(help="prefill: all tokens at once. decode: one token with a cache of that many. Apart by spaces."),
    ] = PHASES,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Calls of which medians are taken; thrice for short ones.")] = 5,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="auto: the model's own; of a preset bfloat16 on CUDA, else float32."),
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is one.")] = "auto",
    backend: Annotated[
        Literal["auto", "torch", "triton"] | None,
        typer.Option(help="Which implementation runs the layer.", show_default="the adapter's, auto"),
    ] = None,
    fold: Annotated[
        Literal["auto", "always", "never"] | None,
        typer.Option(help="Whether later rounds run folded.", show_default="the adapter's, auto"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="PyTorch's")] = None,
    out: Annotated[Path, typer.Option(help="The report's folder: JSON, Markdown, plot, traces.", parser=folder)] = Path(
        "profile_report"
    ),
    plot: Annotated[
        bool | None,
        typer.Option("--plot/--no-plot", help="Whether to draw (PNG and PDF).", show_default="where matplotlib is"),
    ] = None,
) -> None:
    """Where a model's time goes: attention, MLP, experts, routing and GRU.

    Runs torch.profiler on a model with and without adapters, in prefill and
    decode, and writes tables, a plot and Chrome traces of single forwards
    (for chrome://tracing or ui.perfetto.dev).

    Example: graphmoe profile --preset tiny --seq 64 256 1024 --method mixlora mola
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch 2.13's profiler logs every start and stop to stderr
    with one_line_errors("profile"):
        options = ProfileOptions(
            model=model,
            preset=preset,
            layers=layers,
            adapter=adapter,
            method=tuple(method or ()),
            rounds=tuple(rounds or ()),
            seq=tuple(seq),
            phase=tuple(p.value for p in phase),
            batch=batch,
            repetitions=repetitions,
            dtype=dtype,
            device=device,
            backend=backend,
            fold=fold,
            threads=threads,
            out=out,
            plot=plot,
        )
        tell_of_the_hub(model=model, adapter=adapter)
        from rich.console import Console

        from graphmoe_cli.runs import profile as runs

        console = Console()
        with results_folder(out):
            runs.run(options, console)
        console.print(f"Report: {out}")
