"""A table as the demo's report has it: rich on the console, Markdown in the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table as RichTable

from graphmoe_model.presentation import markdown_table


class Table(NamedTuple):
    """Cells of text; every column but the first is numbers."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]


def rich_table(table: Table) -> RichTable:
    """For a rich console; square brackets in a cell are no markup."""
    rich = RichTable(title=escape(table.title), title_justify="left", title_style="bold")
    for index, name in enumerate(table.header):
        rich.add_column(escape(name), justify="right" if index else "left", no_wrap=not index)
    for row in table.rows:
        rich.add_row(*map(escape, row))
    return rich


def titled_markdown(table: Table) -> str:
    """In Markdown, under its title."""
    title = [f"**{table.title}**", ""] if table.title else []
    return "\n".join([*title, *markdown_table(table.header, table.rows)])
