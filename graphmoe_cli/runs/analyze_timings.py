"""What ``graphmoe analyze latency`` and ``composition`` do: read what was measured, print, draw, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_cli.pictures import drawn
from graphmoe_cli.runs.terminal import say_written
from graphmoe_model.analysis.timings import Timings, left_out, read_timings, with_shares, with_times
from graphmoe_model.evaluation.document import write_document
from graphmoe_model.evaluation.overwriting import COMPOSITION, LATENCY, check_overwriting
from graphmoe_model.profiling.result import CATEGORIES, TITLES
from graphmoe_tables.printing import print_whole


def run_latency(files: Sequence[Path], out: Path, plot: bool | None, console: Console) -> None:
    """Show the latencies of files.

    Raises:
        ValueError: a file that holds none; ``out`` holds the latencies of others.
    """
    measured = [read_timings(path) for path in files]
    found, conditions = with_times(measured), _conditions(measured)
    check_overwriting(out / "latency.json", LATENCY, conditions)
    document = {"latency": [_latency_document(own) for own in found], "conditions": conditions}
    write_document(document, out / "latency.json")
    for own in found:
        _print_latency(own, console)
    written = ["latency.json"]
    if drawn(plot):
        from graphmoe_model.analysis.timing_plots import draw_latency  # needs matplotlib, an extra

        written += draw_latency(found, out / "latency.png")
    say_written(out, written, plot, console)


def run_composition(files: Sequence[Path], tokens: int | None, out: Path, plot: bool | None, console: Console) -> None:
    """Show what the latencies of files are composed of.

    Raises:
        ValueError: a file that holds no profile, or none of that length; ``out`` holds the composition of others.
    """
    measured = [read_timings(path) for path in files]
    found, conditions = with_shares(measured, tokens), _conditions(measured)
    check_overwriting(out / "composition.json", COMPOSITION, conditions)
    documents = [
        {"file": own.file, "conditions": own.conditions, "models": [each._asdict() for each in own.models]}
        for own in found
    ]
    write_document({"composition": documents, "conditions": conditions}, out / "composition.json")
    for own in found:
        _print_composition(own, console)
    for line in left_out(measured, found):
        console.print(Text(line), soft_wrap=True)
    written = ["composition.json"]
    if drawn(plot):
        from graphmoe_model.analysis.timing_plots import draw_composition  # needs matplotlib, an extra

        written += draw_composition(found, out / "composition.png")
    say_written(out, written, plot, console)


def _conditions(found: Sequence[Timings]) -> dict[str, list[str]]:
    """Say which files were read, and of what they are, whichever part of that is shown."""
    models = [each for own in found for each in own.models]
    return {
        "files": [own.file for own in found],
        "devices": list(dict.fromkeys(own.device for own in found)),
        "models": list(dict.fromkeys(each.model for each in models)),
        "adapters": list(dict.fromkeys(each.adapter for each in models)),
    }


def _latency_document(own: Timings) -> dict[str, Any]:
    return {
        "file": own.file,
        "conditions": own.conditions,
        "models": [{k: v for k, v in each._asdict().items() if k != "shares"} for each in own.models],
        "layers": [each._asdict() for each in own.layers],
    }


def _print_latency(own: Timings, console: Console) -> None:
    for model, timed in own.by_model().items():
        lengths = sorted({(each.phase, each.tokens) for each in timed})
        console.print(Text(f"{model}, {own.device}: ms"), soft_wrap=True)
        table = Table(box=box.SIMPLE)
        table.add_column("adapter")
        for phase, tokens in lengths:
            table.add_column(f"{phase} {tokens:,}", justify="right")
        for adapter in dict.fromkeys(each.adapter for each in timed):
            times = {(each.phase, each.tokens): each.seconds for each in timed if each.adapter == adapter}
            table.add_row(Text(adapter), *(_ms(times.get(place)) for place in lengths))
        print_whole(table, console)
    for case in dict.fromkeys(each.case for each in own.layers):
        layers = [each for each in own.layers if each.case == case]
        rounds = sorted({each.rounds for each in layers if each.rounds is not None})
        console.print(Text(f"layer, {case}, {own.device}: ms"), soft_wrap=True)
        table = Table(box=box.SIMPLE)
        table.add_column("by")
        for T in rounds:
            table.add_column(f"T = {T}", justify="right")
        for provider in dict.fromkeys(each.provider for each in layers):
            by_rounds = {each.rounds: each.seconds for each in layers if each.provider == provider}
            plain = by_rounds.get(None)  # a provider without rounds: the same whatever T
            table.add_row(Text(provider), *(_ms(by_rounds.get(T, plain)) for T in rounds))
        print_whole(table, console)


def _print_composition(own: Timings, console: Console) -> None:
    for (model, phase), models in own.by_phase().items():
        title = f"{model}, {phase} of {models[0].tokens:,} tokens, {own.device}"
        console.print(Text(title), soft_wrap=True)
        table = Table(box=box.SIMPLE)
        table.add_column("adapter")
        for category in CATEGORIES:
            table.add_column(TITLES[category], justify="right")
        for each in models:
            table.add_row(Text(each.adapter), *(f"{100 * each.shares[category]:.1f}%" for category in CATEGORIES))
        print_whole(table, console)


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.4g}"
