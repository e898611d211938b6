"""The fields of a dataclass as a table, for a page that has a line ``<!-- fields of NAME -->``.

`GraphMoEConfig` is read as text, as importing it takes PyTorch; `TrainingRecipe` is imported and needs nothing else.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from graphmoe_tables.methods import METHODS  # noqa: E402
from graphmoe_tables.recipe import TrainingRecipe  # noqa: E402
from graphmoe_tables.recipe_fields import field_of  # noqa: E402

MARK = re.compile(r"^<!-- fields of (\w+) -->$", re.MULTILINE)


class Row(NamedTuple):
    """What a table says of one field; after a default of None follows what it stands for."""

    name: str
    type: str
    default: str
    help: str


def with_fields(markdown: str) -> str:
    """Put a table in the place of each line that asks for one."""
    return MARK.sub(lambda found: _table(CLASSES[found[1]]()), markdown)


def config_rows() -> list[Row]:
    """The fields of `GraphMoEConfig` that are its own, in their order."""
    path = ROOT / "graphmoe_model" / "config" / "graphmoe_config.py"
    classes = (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    (config,) = (node for node in classes if node.name == "GraphMoEConfig")
    return [_config_row(node) for node in config.body if isinstance(node, ast.AnnAssign)]


def recipe_rows() -> list[Row]:
    """The fields of a recipe, in their order."""
    rows = []
    for field in dataclasses.fields(TrainingRecipe):
        described = field_of(field)
        default = f"`{field.default!r}`" + ("" if described.unset in (None, "none") else f": {described.unset}")
        choices = "" if described.choices is None else f" One of {', '.join(described.choices)}."
        rows.append(Row(field.name, str(field.type), default, described.help + choices))
    return rows


def _config_row(node: ast.AnnAssign) -> Row:
    """Of ``name: type = _option(default, help)``, or of ``field(default=..., metadata={"help": ...})``."""
    assert isinstance(node.value, ast.Call)
    given = {each.arg: each.value for each in node.value.keywords}
    default, text = node.value.args or (given["default"], given["metadata"].values[0])
    words = eval(compile(ast.Expression(text), "help", "eval"), {"METHODS": METHODS})  # text of this repository
    return Row(ast.unparse(node.target), ast.unparse(node.annotation), f"`{ast.literal_eval(default)!r}`", words)


def _table(rows: list[Row]) -> str:
    lines = [f"| `{row.name}` | `{row.type}` | {row.default} | {row.help} |" for row in rows]
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *lines])


CLASSES: dict[str, Callable[[], list[Row]]] = {"GraphMoEConfig": config_rows, "TrainingRecipe": recipe_rows}
