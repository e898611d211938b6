"""``graphmoe eval`` and ``graphmoe compare``: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from graphmoe_cli.arguments import no_bars_in_files, one_line_errors
from graphmoe_cli.evaluate_options import EvaluateOptions, check_file
from graphmoe_tables.tasks import EVALUATION, TASKS


def evaluate(
    model: Annotated[str, typer.Option(help="The base model: a folder, or its name on the hub.")],
    adapter: Annotated[
        str | None, typer.Option(help="A saved adapter, of this package or PEFT's own: a folder, or a name on the hub.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help=f"Questions: {', '.join(TASKS)} (or TASK:SPLIT), or .jsonl files; several of them."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks that lm-eval comes with, such as arc_easy, as it defines them; several of them."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(help="Of tasks without a split of their own; evaluation is the one that results are reported on."),
    ] = EVALUATION,
    shots: Annotated[int, typer.Option(help="K: solved examples before each question.")] = 0,
    examples: Annotated[
        str | None,
        typer.Option(help="Where examples come from: TASK:SPLIT or a file.", show_default="the task's train split"),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="M: self-consistency, the majority of M sampled answers.", show_default="none")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of --samples.", show_default="0.7")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per forward.")] = 8,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N questions of each task.", show_default="all")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt and its answer.", show_default="the model's limit")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of examples and of --samples.")] = 0,
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file in --model that holds the weights.")] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantise the base by bitsandbytes (NF4).")
    ] = False,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Quantise the base by bitsandbytes.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: the model's own.")
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: CUDA where there is one.")] = "auto",
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Also evaluate on another base than the adapter names.")
    ] = False,
    output: Annotated[Path, typer.Option(help="The JSON with scores; never over another evaluation.")] = Path(
        "evaluation.json"
    ),
    records: Annotated[Path | None, typer.Option(help="One JSON line per question, too.")] = None,
) -> None:
    """How well a model, with or without an adapter, answers questions.

    Two scorings by lm-eval: the first token of the answer (the label with the
    largest logit), and the log-likelihood of the choices' texts (acc, acc_norm).
    Prints a table and writes JSON.

    Example: graphmoe eval --model my-llama --adapter my-adapter --data arc_easy boolq
    """
    no_bars_in_files()
    with one_line_errors("eval"):
        options = EvaluateOptions(
            model=model,
            adapter=adapter,
            allow_other_base=allow_other_base,
            data=tuple(data or ()),
            tasks=tuple(tasks or ()),
            split=split,
            shots=shots,
            examples=examples,
            samples=samples,
            temperature=temperature,
            batch_size=batch_size,
            limit=limit,
            max_length=max_length,
            seed=seed,
            gguf_file=gguf_file,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            dtype=dtype,
            device=device,
            output=output,
            records=records,
        )
        from rich.console import Console

        from graphmoe_cli.runs import evaluate as runs

        runs.run(options, Console())


def compare(
    evaluations: Annotated[list[Path], typer.Argument(help="JSON files that graphmoe eval wrote, at least two.")],
    output: Annotated[
        Path | None, typer.Option(help="Write the Markdown page to a file in place of the terminal.")
    ] = None,
) -> None:
    """Evaluations side by side: accuracy, time, memory, parameters, file size.

    What training took is there for adapters of graphmoe train.

    Example: graphmoe compare base.json lora.json graphmoe.json --output page.md
    """
    with one_line_errors("compare"):
        if output is not None:
            check_file("--output", output)
        from graphmoe_cli.runs import compare as runs

        runs.run(evaluations, output)
