"""Tables are printed whole, wherever the output goes."""

from __future__ import annotations

from io import StringIO

from rich.console import Console
from rich.table import Table

from graphmoe_tables.printing import print_whole


def test_a_table_is_as_wide_as_it_is_and_prose_is_not():
    console = Console(file=StringIO(), width=40)
    names, numbers = [f"column {i} of a wide table" for i in range(9)], [f"{i}.123456789" for i in range(9)]
    table = Table(*names)
    table.add_row(*numbers)
    print_whole(table, console)
    console.print("word " * 20)
    printed = console.file.getvalue()
    assert all(name in printed for name in names)
    assert all(number in printed for number in numbers)
    assert "…" not in printed
    assert max(map(len, printed.splitlines()[-3:])) <= 40
