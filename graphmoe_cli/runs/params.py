"""``graphmoe params``: what `graphmoe_model.parameters` counts, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_cli.arguments import NO_MODEL
from graphmoe_cli.runs.configs import named_configs
from graphmoe_model.base_models import is_local_model, load_config
from graphmoe_model.checkpoints import saved_adapter_config
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.parameters import COMPONENTS, AdapterParameters, adapter_parameters
from graphmoe_tables.models import known_model
from graphmoe_tables.printing import print_whole


class _Row(NamedTuple):
    name: str
    title: str
    parameters: AdapterParameters


def run(
    console: Console,
    *,
    model: str | None = None,
    presets: Sequence[str] = (),
    adapter: str | None = None,
    settings: dict[str, Any] | None = None,
    as_json: bool = False,
) -> None:
    """Print what ``graphmoe params`` counts; `graphmoe_cli.params` says what each option means.

    Args:
        settings: fields of `GraphMoEConfig` to overrule the presets', or to make a config of.

    Raises:
        ValueError: whatever is wrong with one of the options, beside what `graphmoe_cli.params.check_params` refuses.
    """
    configs, own = _configs(presets, adapter, settings or {})
    model = model or own
    if not model:
        raise ValueError(NO_MODEL)
    model_config = load_config(model)
    rows = []
    for name, config in configs:
        try:
            rows.append(_Row(name, config.title, adapter_parameters(config, model_config)))
        except ValueError as error:
            raise ValueError(f"{name} on {model}: {error}") from error
    if model == own and known_model(own) is not None and not is_local_model(own):
        print(
            f"Note: the adapter's base is {own}, and no folder here is called so: counted on the known model; "
            "name another one by --model",
            file=sys.stderr,
        )
    if as_json:
        print(json.dumps(_document(model, rows), indent=2))
        return
    print_whole(_table(model, rows), console)


def _configs(
    presets: Sequence[str], adapter: str | None, settings: dict[str, Any]
) -> tuple[list[tuple[str, GraphMoEConfig]], str | None]:
    """The configs to count, each by its name, and the base model that they bring with them."""
    if adapter is not None:
        config = saved_adapter_config(adapter)
        if not isinstance(config, GraphMoEConfig):
            raise ValueError(f"{adapter} is an adapter of {type(config).__name__}; GraphMoE adapters are counted here")
        return [(adapter, config)], config.base_model_name_or_path
    return named_configs(presets, settings), None


def _table(model: str, rows: list[_Row]) -> Table:
    """One row an adapter; components that none of them has are left out."""
    base = rows[0].parameters.base
    shown = [name for name in COMPONENTS if any(row.parameters.components[name] for row in rows)]
    table = Table(
        title=Text(f"Trainable parameters on {model} ({base:,} parameters)"), title_justify="left", box=box.SIMPLE
    )
    for name in ("name", "method"):
        table.add_column(name, no_wrap=True)
    for name in (*shown, "total", "share of base"):
        table.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for name, title, parameters in rows:
        counts = [f"{parameters.components[part]:,}" for part in shown]
        table.add_row(Text(name), title, *counts, f"{parameters.total:,}", f"{parameters.share:.3%}")
    return table


def _document(model: str, rows: list[_Row]) -> dict[str, Any]:
    return {
        "model": model,
        "base_parameters": rows[0].parameters.base,
        "adapters": [
            {
                "name": name,
                "method": title,
                "components": {part: count for part, count in parameters.components.items() if count},
                "total": parameters.total,
                "share": parameters.share,
            }
            for name, title, parameters in rows
        ],
    }
