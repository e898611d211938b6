"""The notebook's cells run one after the other; `make notebook` runs it as a notebook, from an installed wheel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first-steps.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell):
    """What a cell is kept with, in the order of its lines."""
    return "".join(line for output in cell["outputs"] for line in output.get("text", []))


def form(text):
    """A text without its numbers, which differ by machine and version."""
    return " ".join(re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", text).split())


def test_it_is_kept_as_one_run_left_it(cells):
    """A host of Git shows the outputs that are in the file: all of one run, without warnings, bars and folders."""
    ran = code(cells)
    assert len(ran) > 5
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1)), (
        "run it: make notebook ARGS=docs/notebooks/first-steps.ipynb"
    )
    assert all(cell["outputs"] for cell in ran)
    outputs = [output for cell in ran for output in cell["outputs"]]
    assert {output.get("name", "result") for output in outputs} == {"stdout", "result"}
    assert "/" not in "".join(map(printed, ran))
    assert NOTEBOOK.stat().st_size < 20_000
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_every_cell_runs_and_prints_what_it_is_kept_with(cells, tmp_path, monkeypatch, capsys):
    """But for the numbers. An output that is no longer its cell's is found here."""
    pytest.importorskip("trl")
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in code(cells):
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        found = capsys.readouterr().out
        assert form(found) == form(printed(cell)), "run it: make notebook ARGS=docs/notebooks/first-steps.ipynb"
        assert "False" not in found
    losses = [log["loss"] for log in names["trainer"].state.log_history if "loss" in log]
    assert len(losses) == 3
    assert all(1 < loss < 2 for loss in losses), "the base was not taught the form of an answer"


@pytest.mark.parametrize("arguments", [[], ["nowhere.ipynb"], [str(NOTEBOOK), "a", "b"]])
def test_the_runner_says_how_it_is_called(tmp_path, arguments):
    """A traceback said it, of a missing argument or file. What it runs notebooks with is not installed here."""
    for name, text in {"nbformat": "", "nbclient": "NotebookClient = None"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    command = [sys.executable, str(NOTEBOOK.parent / "run.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python docs/notebooks/run.py NOTEBOOK [OUTPUT]")
