"""What ``graphmoe analyze balance`` does: count, print, draw, write."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_cli.analyze_options import DataOptions, ModelOptions
from graphmoe_cli.pictures import drawn
from graphmoe_cli.runs.analyzed_model import AnalyzedModel
from graphmoe_cli.runs.terminal import progress, say_written
from graphmoe_model.analysis.balance import TaskBalance, task_balance
from graphmoe_model.evaluation.document import write_document
from graphmoe_model.evaluation.overwriting import BALANCE, check_overwriting
from graphmoe_model.questions import load_sets
from graphmoe_tables.printing import print_whole

SHARE_ROWS, SHARE_COLUMNS = 24, 8  # of the table of shares; a larger one is in the files alone


def run(options: ModelOptions, data: DataOptions, console: Console) -> list[TaskBalance]:
    """Count the load of every adapter's experts on every task, and write the files.

    Raises:
        ValueError: whatever is wrong with an option, the questions, an adapter or the model.
    """
    sets = load_sets(data.data, data.split)
    analyzed = AnalyzedModel(options)
    data_read = {task: own.source for task, own in sets.items()}
    check_overwriting(options.out / "balance.json", BALANCE, {**analyzed.asked(), "data": data_read})
    prompts = {task: analyzed.prompts(found.questions[: data.limit]) for task, found in sets.items()}
    found: list[TaskBalance] = []
    for name in options.adapter:
        title = analyzed.title(name)
        with analyzed.adapted(name) as model:
            for task, own in prompts.items():
                with progress(f"{title}, {task}") as told:
                    found.append(task_balance(model, title, task, own, options.batch_size, told))
    conditions = {**analyzed.conditions(), "data": data_read, "limit": data.limit}
    document = {"balance": [own.as_dict() for own in found], "conditions": conditions}
    write_document(document, options.out / "balance.json")
    files = ["balance.json"]
    if drawn(options.plot):
        from graphmoe_model.analysis.plots import draw_balance, draw_balance_map  # needs matplotlib, an extra

        files += draw_balance(found, analyzed.described(), options.out / "balance.png")
        files += draw_balance_map(found, analyzed.described(), options.out / "balance_map.png")
    _print_shares(found, console)
    _print(found, console)
    say_written(options.out, files, options.plot, console)
    return found


def _print_shares(found: list[TaskBalance], console: Console) -> None:
    """Print each expert's share of each round of each router, where that is no more than a screen of rows."""
    rows = [
        (own, router, t, round_)
        for own in found
        for router, rounds in own.shares.items()
        for t, round_ in enumerate(rounds)
    ]
    experts = max(len(round_) for *_, round_ in rows)
    if len(rows) > SHARE_ROWS or experts > SHARE_COLUMNS:
        console.print(Text("Each expert's share of each router and round is in balance.json, and in the map."))
        return
    table = Table(box=box.SIMPLE)
    for name in ("adapter", "task", "router"):
        table.add_column(name)
    for name in ("round", *(f"expert {i}" for i in range(experts))):
        table.add_column(name, justify="right")
    for own, router, t, round_ in rows:
        names = (Text(own.adapter), Text(own.task), Text(router)) if t == 0 else ("", "", "")
        table.add_row(*names, str(t + 1), *(f"{100 * share:.1f}%" for share in round_))
    print_whole(table, console)


def _print(found: list[TaskBalance], console: Console) -> None:
    table = Table(box=box.SIMPLE)
    for name in ("adapter", "task"):
        table.add_column(name)
    for name in ("tokens", "round", "deviation", "variation", "largest", "smallest", "unused"):
        table.add_column(name, justify="right")
    for own in found:
        rows = [(str(i + 1), balance) for i, balance in enumerate(own.rounds)]
        rows += [] if own.attention is None else [("attention", own.attention)]
        for i, (title, balance) in enumerate(rows):
            first = (Text(own.adapter), Text(own.task), f"{own.tokens:,}") if i == 0 else ("", "", "")
            shares = (balance.deviation, balance.largest, balance.smallest)
            deviation, largest, smallest = (f"{100 * share:.1f}%" for share in shares)
            table.add_row(*first, title, deviation, f"{balance.variation:.2f}", largest, smallest, str(balance.unused))
    print_whole(table, console)
    console.print(
        Text(
            "Shares of a round's load, means over the routers of MLPs (those of attention have no rounds): the "
            "standard deviation over experts, its ratio to the mean share (0: even), the largest and the smallest "
            "share, and how many experts got nothing."
        )
    )
