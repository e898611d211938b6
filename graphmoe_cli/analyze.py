"""``graphmoe analyze``: the paper's analyses of trained adapters, each a table, a picture and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graphmoe_cli.analyze_options import DataOptions, ModelOptions, SweepOptions, TraceOptions, check_files
from graphmoe_cli.arguments import ListCommand, folder, no_bars_in_files, one_line_errors, tell_of_the_hub
from graphmoe_cli.results_folder import results_folder
from graphmoe_cli.train import check_installed
from graphmoe_tables.recipe_files import recipe_of
from graphmoe_tables.tasks import EVALUATION, TASKS

analyze = typer.Typer(
    name="analyze",
    help="The paper's analyses of trained adapters: tables, pictures and JSON.",
    no_args_is_help=True,
)
Model = Annotated[str, typer.Option(help="The base model: a folder, or its name on the hub.")]
GgufFile = Annotated[str | None, typer.Option(help="The GGUF file in --model that holds the weights.")]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Also take an adapter that names another base.")
]
Split = Annotated[str, typer.Option(help="Of tasks without a split of their own.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per forward.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a prompt; longer questions lose their start, longer texts are refused.",
        show_default="the model's limit",
    ),
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the model's own.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is one.")]
Plot = Annotated[
    bool | None, typer.Option("--plot/--no-plot", help="Whether to draw.", show_default="where matplotlib is")
]
DATA_HELP = f"Questions: {', '.join(TASKS)} (or TASK:SPLIT), or .jsonl files; several of them."


@analyze.command(cls=ListCommand)
def balance(
    model: Model,
    adapter: Annotated[list[str], typer.Option(help="Saved adapters with routers, side by side: folders or names.")],
    data: Annotated[list[str], typer.Option(help=DATA_HELP)],
    gguf_file: GgufFile = None,
    allow_other_base: AllowOtherBase = False,
    split: Split = EVALUATION,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions.", show_default="all")] = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="The folder of JSON and pictures.", parser=folder)] = Path("balance"),
    plot: Plot = None,
) -> None:
    """How evenly the experts share the tokens, by task, layer and round (Fig. 4).

    Counts the tokens of the questions' prompts. Writes balance.json, and
    two pictures as PNG and PDF where matplotlib is installed.

    Example: graphmoe analyze balance --model my-llama --adapter mixlora graphmoe --data boolq piqa
    """
    with one_line_errors("analyze balance"):
        no_bars_in_files()
        options = ModelOptions(
            model, tuple(adapter), gguf_file, allow_other_base, batch_size, max_length, dtype, device, out, plot
        )
        questions = DataOptions(tuple(data), split, limit)
        for each in adapter:
            tell_of_the_hub(adapter=each)
        from rich.console import Console

        from graphmoe_cli.runs import analyze_balance

        with results_folder(out):
            analyze_balance.run(options, questions, Console())


@analyze.command(cls=ListCommand)
def trace(
    model: Model,
    adapter: Annotated[str, typer.Option(help="A saved adapter with routers and two rounds or more.")],
    text: Annotated[list[str] | None, typer.Option(help="Texts; the first one is drawn.")] = None,
    data: Annotated[list[str] | None, typer.Option(help=DATA_HELP)] = None,
    gguf_file: GgufFile = None,
    allow_other_base: AllowOtherBase = False,
    split: Split = EVALUATION,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N questions of each --data.", show_default="all")
    ] = None,
    router: Annotated[
        list[str] | None,
        typer.Option(help="Routers to draw, such as model.layers.0.mlp.", show_default="the first, middle and last"),
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws from the null distribution.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: BatchSize = 8,
    max_length: MaxLength = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="The folder of JSON and pictures.", parser=folder)] = Path("trace"),
    plot: Plot = None,
) -> None:
    """Which experts each token visits in each round, and whether experts specialise by round.

    The specialisation is the information that a round gives about the
    expert, 0 to 1, beside what it would be if rounds did not matter. Writes
    trace.json, and a picture as PNG and PDF where matplotlib is installed.

    Example: graphmoe analyze trace --model my-llama --adapter graphmoe --data boolq --text "Is water wet?"
    """
    with one_line_errors("analyze trace"):
        no_bars_in_files()
        options = ModelOptions(
            model, (adapter,), gguf_file, allow_other_base, batch_size, max_length, dtype, device, out, plot
        )
        questions = DataOptions(tuple(data or ()), split, limit)
        traced = TraceOptions(tuple(text or ()), questions, tuple(router or ()), draws, seed)
        tell_of_the_hub(adapter=adapter)
        from rich.console import Console

        from graphmoe_cli.runs import analyze_trace

        with results_folder(out):
            analyze_trace.run(options, traced, Console())


Config = Annotated[Path, typer.Option(help="The recipe that is varied: a YAML file of graphmoe train.")]
TestData = Annotated[
    list[str] | None,
    typer.Option(help=f"What adapters are asked. {DATA_HELP}", show_default="the recipe's tasks, evaluation split"),
]
Limit = Annotated[int | None, typer.Option(help="Only the first N questions of each.", show_default="all")]
Seeds = Annotated[
    list[int] | None,
    typer.Option(help="Each setting is trained with each of them.", show_default="the recipe's"),
]


@analyze.command(cls=ListCommand)
def sensitivity(
    config: Config,
    rounds: Annotated[list[int], typer.Option(help="T, at the recipe's GRU scale.")] = [1, 2, 3, 4],  # noqa: B006
    scales: Annotated[
        list[float] | None,
        typer.Option(help="GRU widths over the hidden size, at the recipe's rounds.", show_default="none"),
    ] = None,
    test_data: TestData = None,
    limit: Limit = None,
    seeds: Seeds = None,
    out: Annotated[Path, typer.Option(help="The folder of the sweep.", parser=folder)] = Path("sensitivity"),
    plot: Plot = None,
) -> None:
    """Accuracy and time against the rounds T and the GRU's scale (Fig. 5a, 5b).

    Trains and asks an adapter for each setting and seed. The same command
    goes on with what was interrupted. Writes sensitivity.json, and
    a picture as PNG and PDF where matplotlib is installed.

    Example: graphmoe analyze sensitivity --config arc.yaml --rounds 1 2 3 --scales 0.05 0.1 0.2 --seeds 0 1 2
    """
    _sweep("sensitivity", config, {"rounds": rounds, "scales": scales or []}, test_data, limit, seeds, out, plot)


@analyze.command(cls=ListCommand)
def parameters(
    config: Config,
    ranks: Annotated[list[int], typer.Option(help="LoRA ranks of the recipe's method.")],
    test_data: TestData = None,
    limit: Limit = None,
    seeds: Seeds = None,
    out: Annotated[Path, typer.Option(help="The folder of the sweep.", parser=folder)] = Path("parameters"),
    plot: Plot = None,
) -> None:
    """Accuracy against trained parameters, beside the base method with about as many (Table 5).

    The recipe at each rank, and the method without rounds at the rank that
    comes nearest in parameters. The same command goes on with what was
    interrupted. Writes parameters.json, and a picture.

    Example: graphmoe analyze parameters --config arc.yaml --ranks 8 16 32
    """
    _sweep("parameters", config, {"ranks": ranks}, test_data, limit, seeds, out, plot)


@analyze.command(cls=ListCommand)
def activated(
    config: Config,
    top_k: Annotated[list[int], typer.Option(help="Experts per token.")] = [2, 4],  # noqa: B006
    test_data: TestData = None,
    limit: Limit = None,
    seeds: Seeds = None,
    out: Annotated[Path, typer.Option(help="The folder of the sweep.", parser=folder)] = Path("activated"),
    plot: Plot = None,
) -> None:
    """Accuracy and time against the experts of each token (Table 6).

    The same command goes on with what was interrupted. Writes
    activated.json, and a picture where matplotlib is installed.

    Example: graphmoe analyze activated --config arc.yaml --top-k 2 4
    """
    _sweep("activated", config, {"top_k": top_k}, test_data, limit, seeds, out, plot)


Files = Annotated[
    list[Path], typer.Argument(help="profile.json of graphmoe profile, results of pytest benchmarks; several of them.")
]


@analyze.command()
def latency(
    files: Files,
    out: Annotated[Path, typer.Option(help="The folder of JSON and pictures.", parser=folder)] = Path("latency"),
    plot: Plot = None,
) -> None:
    """Time of a decoded token and of a prefill by adapter and length, and of a layer by T (Fig. 5c).

    Shows what was measured before, on any machine.

    Example: graphmoe profile --preset tiny --method mixlora loramoe mola && graphmoe analyze latency
    profile_report/profile.json
    """
    with one_line_errors("analyze latency"):
        check_files(files, out, plot)
        from rich.console import Console

        from graphmoe_cli.runs import analyze_timings

        with results_folder(out):
            analyze_timings.run_latency(files, out, plot, Console())


@analyze.command()
def composition(
    files: Files,
    tokens: Annotated[
        int | None,
        typer.Option(help="Of which length of the sequences.", show_default="the longest of each model and phase"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of JSON and pictures.", parser=folder)] = Path("composition"),
    plot: Plot = None,
) -> None:
    """Shares of attention, MLP, experts, routing and GRU, by adapter (Fig. 6).

    Shows what was measured before, on any machine.

    Example: graphmoe analyze composition profile_report/profile.json --tokens 1024
    """
    with one_line_errors("analyze composition"):
        check_files(files, out, plot)
        from rich.console import Console

        from graphmoe_cli.runs import analyze_timings

        with results_folder(out):
            analyze_timings.run_composition(files, tokens, out, plot, Console())


def _sweep(
    kind: str,
    config: Path,
    grid: dict[str, list[Any]],
    test_data: list[str] | None,
    limit: int | None,
    seeds: list[int] | None,
    out: Path,
    plot: bool | None,
) -> None:
    with one_line_errors(f"analyze {kind}"):
        recipe = recipe_of({"output": str(out)}, config)
        options = SweepOptions(kind, recipe, grid, tuple(test_data or ()), limit, tuple(seeds or ()), out, plot)
        check_installed()
        no_bars_in_files()
        from rich.console import Console

        from graphmoe_cli.runs import analyze_sweep

        try:
            with results_folder(out):
                analyze_sweep.run(options, Console())
        except KeyboardInterrupt as error:
            typer.echo(f"graphmoe analyze {kind}: interrupted; the same command goes on", err=True)
            raise typer.Exit(130) from error  # as shells have it of what Ctrl-C ended
