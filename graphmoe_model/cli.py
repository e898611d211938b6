"""The command line: ``graphmoe <command>``. One function a command; what it needs is imported when it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
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


class Phase(StrEnum):
    """What of a generation is profiled (Typer takes lists of enumerations, not of Literals)."""

    prefill = "prefill"
    decode = "decode"


PHASES = list(Phase)
LENGTHS = [64, 256, 1024]


def _folder(given: str | Path) -> Path:
    """A path that is there: an empty one, such as an unset variable gives, would be the current folder."""
    text = str(given)
    if not text or "\0" in text:
        raise typer.BadParameter("it is empty; name a folder (. is the current one)" if not text else "it has a NUL")
    return Path(text)


class ListCommand(TyperCommand):
    """Takes ``--seq 64 256`` for ``--seq 64 --seq 256``; for commands without positional arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Typer's, with a list option's name repeated before each of its values."""
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        spread: list[str] = []
        current: str | None = None
        waiting: str | None = None  # a list option that no value has followed yet
        for arg in [*args, "--"]:
            if not arg.startswith("--"):
                spread += [arg] if current is None else [current, arg]
                waiting = None
                continue
            if waiting is not None:
                raise typer.BadParameter("it needs at least one value", ctx=ctx, param_hint=f"'{waiting}'")
            name, _, value = arg.partition("=")
            current = name if name in lists else None
            waiting = None if value else current
            spread += [arg] if value or current is None else []
        return super().parse_args(ctx, spread[:-1])


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
            "sizes of llama-3.2-1b, llama-3-8b, llama-3-70b or qwen3-4b (fewer layers than the model's make 'other' "
            "larger)."
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
    out: Annotated[Path, typer.Option(help="The report's folder: JSON, Markdown, PNG, traces.", parser=_folder)] = Path(
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


@app.command(cls=ListCommand)
def params(
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help="The papers' settings: lora, dora, mixlora, mixdora, loramoe, doramoe, mola, moda, graphmoe-<name> of "
            "each but the first two; several of them, or all."
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A saved GraphMoE adapter instead: a folder, or a name.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: tiny, llama-3.2-1b, llama-3-8b, llama-3-70b, qwen3-4b, or else a folder or a name on "
            "the hub, of which the config.json is read.",
            show_default="the adapter's own",
        ),
    ] = None,
    method: Annotated[
        Literal["lora", "mixlora", "loramoe", "mola"] | None,
        typer.Option(help="A method with its defaults instead of a preset."),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="LoRA rank.", show_default="the preset's")] = None,
    num_experts: Annotated[
        str | None,
        typer.Option(
            help="Experts a layer: 8, a pattern as 2-4-6-8 for equal groups of layers, or 2,2,4,4 for each layer.",
            show_default="the preset's",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts a token.", show_default="the preset's")] = None,
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
    with _errors("params"):
        settings = {
            "method": method,
            "r": r,
            "num_experts": None if num_experts is None else _expert_counts(num_experts),
            "top_k": top_k,
            "rounds": rounds,
            "use_dora": dora,
        }
        from rich.console import Console

        from graphmoe_model.parameters.command import run

        run(
            Console(),
            model=model,
            presets=preset or (),
            adapter=adapter,
            settings={name: value for name, value in settings.items() if value is not None},
            as_json=as_json,
        )


def _expert_counts(text: str) -> int | list[int] | str:
    """A number or a list of them; anything else is a pattern, or for the config to refuse."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        return text
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


@app.command(cls=ListCommand)
def memory(
    model: Annotated[
        str,
        typer.Option(
            help="The base model: tiny, llama-3.2-1b, llama-3-8b, llama-3-70b, qwen3-4b, or else a folder or a name on "
            "the hub, of which the config.json is read."
        ),
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="single, ddp, fsdp2, zero2, zero3, single-4bit, ddp-4bit, fsdp2-4bit; several of them.",
            show_default="all",
        ),
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many, one process on each; single has one.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens on each GPU in one forward.")] = 4096,
    preset: Annotated[
        str | None,
        typer.Option(help="The papers' settings, as in graphmoe params.", show_default="GraphMoEConfig's defaults"),
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
    with _errors("memory"):
        from rich.console import Console

        from graphmoe_model.memory.command import run

        run(
            Console(),
            model=model,
            strategies=strategy or (),
            preset=preset,
            settings={name: value for name, value in {"r": r, "rounds": rounds}.items() if value is not None},
            gpus=gpus,
            tokens=tokens,
            checkpointing=checkpointing,
            as_json=as_json,
        )


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="The folder of an adapter as GraphMoE, MoE-PEFT or PEFT's LoRA saves it.", parser=_folder),
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write.", parser=_folder)],
    to: Annotated[
        Literal["graphmoe", "moe-peft", "attention-lora"],
        typer.Option(
            help="graphmoe: an adapter of this package. moe-peft: one that MoE-PEFT reads. attention-lora: PEFT's LoRA "
            "adapter of the attention projections alone."
        ),
    ] = "graphmoe",
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds T of the GraphMoE adapter to write, with fresh GRUs.", show_default="the source's"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a target that exists.")] = False,
) -> None:
    """Convert a saved adapter from or to another format, or add rounds to it.

    Example: graphmoe convert moe_peft_adapter graphmoe_adapter --rounds 3
    """
    with _errors("convert"):
        from rich.console import Console

        from graphmoe_model.conversion.command import run

        run(source, target, to=to, rounds=rounds, overwrite=overwrite, console=Console())


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
