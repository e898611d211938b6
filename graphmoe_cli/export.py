"""``graphmoe export``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from graphmoe_cli.arguments import folder, no_bars_in_files, one_line_errors, tell_of_the_hub


def export(
    model: Annotated[str, typer.Option(help="The base model: a folder, or its name on the hub.")],
    adapter: Annotated[str, typer.Option(help="A saved adapter of this package: a folder, or its name on the hub.")],
    output: Annotated[Path, typer.Option(help="The folder that is written: new, or empty.", parser=folder)],
    gguf_file: Annotated[str | None, typer.Option(help="The GGUF file in --model that holds the weights.")] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Also export with another base than the adapter names.")
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the base: auto is the model's own.")
    ] = "auto",
) -> None:
    """Base and adapter in one folder, which loads and generates without PEFT.

    graphmoe_inference.load_for_inference(FOLDER) gives the model, with the
    logits that it has under PEFT. The tokenizer is in FOLDER/base.

    Example: graphmoe export --model my-llama --adapter my-adapter --output exported
    """
    with one_line_errors("export"):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"--output {output} is there already; name a new folder")
        tell_of_the_hub(adapter=adapter)
        no_bars_in_files()
        from rich.console import Console

        from graphmoe_cli.runs import export as runs

        runs.run(model, adapter, output, gguf_file, dtype, Console(), allow_other_base=allow_other_base)
