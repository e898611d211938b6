"""The command line in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from graphmoe_cli.app import app


def graphmoe(*arguments: object, columns: int | None = None) -> Any:
    """The command's result: exit_code, stdout, stderr, exception; columns are those of the terminal."""
    width = {} if columns is None else {"COLUMNS": str(columns)}
    return CliRunner().invoke(app, list(map(str, arguments)), env=width)
