"""The command line: ``graphmoe <command>``. One function a command; what it needs is imported when it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

app = typer.Typer(
    name="graphmoe",
    help="GraphMoE: mixture-of-LoRA-experts layers with self-rethinking.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Phase(str, Enum):
    """What of a generation is profiled (Typer takes lists of enumerations, not of Literals)."""

    prefill = "prefill"
    decode = "decode"


PHASES = list(Phase)
LENGTHS = [64, 256, 1024]


class ListCommand(TyperCommand):
    """Takes ``--seq 64 256`` for ``--seq 64 --seq 256``; none of the commands has positional arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer's, with a list option's name repeated before each of its values."""
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        spread: list[str] = []
        current: str | None = None
        for arg in args:
            if arg.startswith("--"):
                name, _, value = arg.partition("=")
                current = name if name in lists else None
                spread += [arg] if value or current is None else []
            else:
                spread += [arg] if current is None else [current, arg]
        return super().parse_args(ctx, spread)


@app.callback()
def graphmoe() -> None:
    """GraphMoE: mixture-of-LoRA-experts layers with self-rethinking."""


@app.command(cls=ListCommand)
def profile(
    model: Annotated[str | None, typer.Option(help="A Transformers model: its name on the hub, or a folder.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Random weights in place of a model, so nothing is downloaded: tiny, or a few layers of the real "
            "sizes of llama-3.2-1b, llama-3-8b or qwen3-4b (fewer layers than the model's make 'other' larger)."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="How many layers the preset has.", show_default="2 or 4")] = None,
    adapter: Annotated[str | None, typer.Option(help="A saved adapter of the model: a folder, or a name.")] = None,
    rounds: Annotated[
        list[int] | None,
        typer.Option(
            help="Fresh adapters by their rounds T: 0 is no adapter, 1 MixLoRA, more GraphMoE.",
            show_default="0 1 3; with --adapter none",
        ),
    ] = None,
    seq: Annotated[list[int], typer.Option(help="Sequence lengths in tokens.")] = LENGTHS,
    phase: Annotated[
        list[Phase], typer.Option(help="prefill: all tokens at once. decode: one token with a cache of that many.")
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
    out: Annotated[Path, typer.Option(help="The report's folder: JSON, Markdown, PNG, traces.")] = Path(
        "profile_report"
    ),
    plot: Annotated[bool, typer.Option(help="Whether to draw profile.png (needs matplotlib).")] = True,
) -> None:
    """Where a model's time goes: attention, MLP, experts, routing and GRU.

    Runs torch.profiler on a model with and without adapters, in prefill and
    decode, and writes tables, a plot and Chrome traces of single forwards
    (for chrome://tracing or ui.perfetto.dev).

    Example: graphmoe profile --preset tiny --seq 64 256 1024
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch 2.13's profiler logs every start and stop to stderr
    with _errors("profile"):
        from rich.console import Console

        from graphmoe_model.profiling.command import ProfileOptions, run

        options = ProfileOptions(
            model=model,
            preset=preset,
            layers=layers,
            adapter=adapter,
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
        console = Console()
        run(options, console)
        console.print(f"Report: {out}")


@contextmanager
def _errors(command: str) -> Iterator[None]:
    """What the user can mend ends in one line and status 2; anything else is a fault here and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        typer.echo(f"graphmoe {command}: error: {error}", err=True)
        raise typer.Exit(2) from error


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
