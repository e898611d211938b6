"""What ``graphmoe export`` does: load the base, attach the adapter, write both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from graphmoe_cli.runs.evaluate import DTYPES
from graphmoe_cli.runs.terminal import hide_loading_bars
from graphmoe_model.base_models import ModelSource, check_base, load_base_model, load_tokenizer
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.evaluation.adapters import attach_adapter, saved_config
from graphmoe_model.exporting import export_for_inference
from graphmoe_model.profiling.models import adapter_title


def run(
    model: str,
    adapter: str,
    output: Path,
    gguf_file: str | None,
    dtype: str,
    console: Console,
    *,
    allow_other_base: bool,
) -> None:
    """Export an adapter with its base.

    Raises:
        ValueError: whatever is wrong with the adapter, the model or the folder.
    """
    hide_loading_bars()
    config = saved_config(adapter)
    if not isinstance(config, GraphMoEConfig):
        raise ValueError(
            f"the adapter {adapter} is {adapter_title(config)} of PEFT's own, which merges into its base: "
            "PeftModel.merge_and_unload"
        )
    if not allow_other_base:
        check_base(config, adapter, model)
    source = ModelSource(model, gguf_file, dtype=DTYPES.get(dtype))
    tokenizer = load_tokenizer(source)
    adapted: Any = attach_adapter(load_base_model(source), adapter, config)
    exported = export_for_inference(adapted, output, tokenizer)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    what = f"{exported.title} on {len(exported.mlps)} MLPs and {len(exported.linears)} linears, {_told(size)}"
    console.print(Text(f"{output}: {what}"), soft_wrap=True)
    console.print(Text(f'graphmoe_inference.load_for_inference("{output}") loads it, without PEFT'), soft_wrap=True)


def _told(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
