"""``graphmoe memory``: what `graphmoe_model.memory` finds, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_cli.runs.configs import named_configs
from graphmoe_model.base_models import load_config
from graphmoe_model.memory import COMPONENTS, STRATEGIES, Memory, memory_per_gpu
from graphmoe_tables.printing import print_whole


def run(
    console: Console,
    *,
    model: str,
    strategies: Sequence[str] = (),
    presets: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    gpus: int = 8,
    tokens: int = 4096,
    loss_tokens: int | None = None,
    checkpointing: bool = True,
    as_json: bool = False,
) -> None:
    """Print what ``graphmoe memory`` finds; `graphmoe_cli.memory` says what each option means.

    Args:
        settings: fields of `GraphMoEConfig` to overrule the preset's, or the defaults.

    Raises:
        ValueError: whatever is wrong with one of the options.
    """
    names = list(dict.fromkeys(strategies)) or list(STRATEGIES)
    configs, model_config = named_configs(presets, settings or {}), load_config(model)
    found: list[tuple[str, str, dict[str, Memory]]] = []
    for name, config in configs:
        try:
            memory = memory_per_gpu(
                config,
                model_config,
                names,
                gpus=gpus,
                tokens=tokens,
                checkpointing=checkpointing,
                loss_tokens=loss_tokens,
            )
        except ValueError as error:
            raise ValueError(f"{name} on {model}: {error}" if presets else str(error)) from error
        found.append((name, config.title, memory))
    if as_json:
        print(json.dumps(_document(model, found), indent=2))
        return
    for _, title, memory in found:
        table = _table(memory)
        in_loss = "" if loss_tokens is None else f", a loss on {loss_tokens:,} of them"
        table.title = Text(
            f"GB on each GPU, to train {title} on {model}: {_count(names, gpus)}, {tokens:,} tokens on each{in_loss}, "
            f"bf16, AdamW, {'with' if checkpointing else 'without'} gradient checkpointing"
        )
        print_whole(table, console)


def _count(strategies: Sequence[str], gpus: int) -> str:
    """How many GPUs there are; the strategy single has one of them."""
    return "1 GPU" if gpus == 1 or set(strategies) == {"single"} else f"{gpus} GPUs"


def gigabytes(count: int) -> str:
    """A number of bytes as the table has it."""
    return f"{count / 1e9:.1f}"


def _table(found: dict[str, Memory]) -> Table:
    table = Table(title_justify="left", box=box.SIMPLE)
    table.add_column("strategy", no_wrap=True)
    for name in (*COMPONENTS, "total", "folds kept in evaluation"):
        table.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for name, memory in found.items():
        parts = [gigabytes(memory.components[part]) for part in COMPONENTS]
        table.add_row(Text(name), *parts, gigabytes(memory.total), gigabytes(memory.kept_folds))
    return table


def _document(model: str, found: list[tuple[str, str, dict[str, Memory]]]) -> dict[str, Any]:
    return {
        "model": model,
        "adapters": [
            {
                "name": name,
                "method": title,
                "bytes": {
                    strategy: {**own.components, "total": own.total, "folds kept in evaluation": own.kept_folds}
                    for strategy, own in memory.items()
                },
            }
            for name, title, memory in found
        ],
    }
