"""What ``graphmoe profile`` does: build the models, profile them, write the report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn

from graphmoe_cli.pictures import NO_MATPLOTLIB
from graphmoe_cli.profile_options import FreshAdapter, ProfileOptions
from graphmoe_model.machine import chosen_device, device_name
from graphmoe_model.presentation import short_model
from graphmoe_model.profiling.measure import profile_model
from graphmoe_model.profiling.models import profiled_config, random_model, saved_model, with_adapter, with_fresh
from graphmoe_model.profiling.report import describe, print_report, write_report
from graphmoe_model.profiling.result import Profile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(options: ProfileOptions, console: Console) -> list[Profile]:
    """Profiles the model with every adapter in turn, prints the tables and writes the report to ``options.out``.

    Raises:
        ValueError: whatever is wrong with the options, the model or the adapter, before anything is measured.
        MemoryError: the model or a forward does not fit into memory.
    """
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # of others: nothing has run here yet
    with _threads(options.threads):
        device = chosen_device(options.device)
        model = _load(options, device)
        settings = {name: v for name, v in (("fold", options.fold), ("backend", options.backend)) if v is not None}
        profiles: list[Profile] = []
        with console.status("") as status:
            for variant in options.variants:
                with _variant(model, variant, settings) as (adapted, title):
                    if any(own.adapter == title for own in profiles):  # a saved adapter, of a fresh one's method
                        title = f"{title}, {short_model(str(variant))}"
                    profiles += profile_model(
                        adapted,
                        title,
                        list(dict.fromkeys(options.phase)),
                        list(dict.fromkeys(options.seq)),
                        name=options.model or options.preset,
                        batch=options.batch,
                        repetitions=options.repetitions,
                        traces=options.out,
                        progress=status.update,
                    )
        conditions = _conditions(options, model, device, load)
    write_report(profiles, conditions, options.out)
    if options.drawn:
        from graphmoe_model.profiling.plot import draw_shares  # needs matplotlib, which is an extra

        draw_shares(profiles, describe(conditions), options.out / "profile.png")
    print_report(profiles, conditions, console)
    if options.plot is None and not options.drawn:
        console.print(f"No profile.png: {NO_MATPLOTLIB}.", markup=False, highlight=False, soft_wrap=True)
    return profiles


def _cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(options: ProfileOptions, device: torch.device) -> nn.Module:
    dtype = DTYPES.get(options.dtype)
    if options.model is not None:
        return saved_model(options.model, dtype, device)
    assert options.preset is not None
    config = profiled_config(options.preset, options.layers)
    return random_model(config, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32), device)


def _variant(
    model: nn.Module, variant: FreshAdapter | str | None, settings: dict[str, Any]
) -> AbstractContextManager[tuple[nn.Module, str]]:
    if variant is None:
        return nullcontext((model, "none"))
    if isinstance(variant, FreshAdapter):
        return with_fresh(model, *variant, **settings)
    return with_adapter(model, variant, **settings)


def _conditions(options: ProfileOptions, model: nn.Module, device: torch.device, load: float | None) -> dict[str, Any]:
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    parameter = next(model.parameters())
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": _cores(),
        "load average": load,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": f"{config.num_attention_heads}/{config.num_key_value_heads}",
        "batch": options.batch,
        "fold": options.fold or "auto",
        "backend": options.backend or "auto",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
