"""What ``graphmoe analyze trace`` does: follow the tokens, compare rounds with chance, print, draw, write."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_cli.analyze_options import ModelOptions, TraceOptions
from graphmoe_cli.pictures import drawn
from graphmoe_cli.runs.analyzed_model import AnalyzedModel
from graphmoe_cli.runs.terminal import progress, say_written
from graphmoe_model.analysis.routers import check_routers, mlp_routers
from graphmoe_model.analysis.specialisation import Specialisation
from graphmoe_model.analysis.trace import Trace, trace_prompts
from graphmoe_model.evaluation.document import write_document
from graphmoe_model.evaluation.overwriting import TRACE, check_overwriting
from graphmoe_model.questions import load_sets
from graphmoe_tables.printing import print_whole


def run(options: ModelOptions, traced: TraceOptions, console: Console) -> Trace:
    """Trace the texts and questions through an adapter, and write the files.

    Raises:
        ValueError: whatever is wrong with an option, the questions, the adapter or the model; a router that there is
            not.
    """
    sets = load_sets(traced.data.data, traced.data.split)
    analyzed = AnalyzedModel(options, at_least_rounds=2)
    read = {"text": list(traced.text), "data": {task: own.source for task, own in sets.items()}}
    check_overwriting(options.out / "trace.json", TRACE, {**analyzed.asked(), **read})
    prompts = [_text_ids(analyzed, text) for text in traced.text]
    for found in sets.values():
        prompts += analyzed.prompts(found.questions[: traced.data.limit])
    (name,) = options.adapter
    with analyzed.adapted(name) as model:
        check_routers(traced.router, mlp_routers(model))
        with progress("prompts") as reading, progress("draws") as drawing:
            trace = trace_prompts(
                model,
                analyzed.tokenizer,
                prompts,
                options.batch_size,
                draws=traced.draws,
                seed=traced.seed,
                reading=reading,
                drawing=drawing,
            )
    shown = _shown(list(trace.routers), traced.router)
    conditions = {
        **analyzed.conditions(),
        **read,
        "limit": traced.data.limit,
        "draws": traced.draws,
        "seed": traced.seed,
    }
    write_document({**trace.as_dict(), "conditions": conditions}, options.out / "trace.json")
    _print(trace, analyzed.title(name), console)
    files = ["trace.json"]
    if drawn(options.plot):
        from graphmoe_model.analysis.plots import TOKENS, draw_trace  # needs matplotlib, an extra

        described = f"{analyzed.title(name)}, {analyzed.described()}"
        files += draw_trace(trace, shown, described, options.out / "trace.png")
        if len(trace.tokens) > TOKENS:
            console.print(Text(f"The picture has the first {TOKENS} of {len(trace.tokens)} tokens; the JSON has all."))
    say_written(options.out, files, options.plot, console)
    return trace


def _text_ids(analyzed: AnalyzedModel, text: str) -> list[int]:
    ids = list(analyzed.tokenizer(text)["input_ids"])
    if len(ids) > analyzed.max_length:
        raise ValueError(
            f"a text of --text has {len(ids):,} tokens, and the model takes {analyzed.max_length:,} (--max-length); "
            "give a shorter one"
        )
    return ids


def _shown(routers: Sequence[str], asked: Sequence[str]) -> list[str]:
    """The routers that are drawn."""
    return list(asked) or list(dict.fromkeys((routers[0], routers[len(routers) // 2], routers[-1])))


def _print(trace: Trace, title: str, console: Console) -> None:
    table = Table(box=box.SIMPLE)
    table.add_column("router")
    for name in ("specialisation", "by chance", "95% below", "p", "kept"):
        table.add_column(name, justify="right")
    for name, own in trace.by_router.items():
        table.add_row(Text(name), *_cells(own))
    table.add_section()
    table.add_row("all", *_cells(trace.overall))
    console.print(Text(f"{title}: {trace.num_tokens:,} tokens of {trace.texts:,} texts"), soft_wrap=True)
    print_whole(table, console)
    console.print(
        Text(
            "Specialisation: the information that a round gives about the expert, 0 (none) to 1 (the most there can "
            "be, as where each round has experts of its own). By chance: where each token's experts are dealt out anew "
            "among its rounds. Kept: the share of later rounds' choices that the first round made too."
        )
    )


def _cells(own: Specialisation) -> list[str]:
    return [
        f"{own.information:.2g}",
        f"{own.null_mean:.2g}",
        f"{own.null_95:.2g}",
        f"{own.p:.3f}",
        f"{100 * own.kept:.1f}%",
    ]
