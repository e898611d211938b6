"""The notebook's cells run one after the other; `make notebook` runs it as a notebook, from an installed wheel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first-steps.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_kept_without_outputs(cells):
    """Those of one run would be in every change of it."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_every_cell_runs(cells, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    assert "unchanged: True" in printed
    assert "the same logits: True" in printed
    losses = [log["loss"] for log in names["trainer"].state.log_history if "loss" in log]
    assert len(losses) == 3
    assert all(1 < loss < 2 for loss in losses), "the base was not taught the form of an answer"
