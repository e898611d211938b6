"""``graphmoe data``: a table of names that can be typed, and a fetch that says whose the data are, and their use."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from graphmoe_cli.app import app
from graphmoe_tables.tasks import MODELS, TASKS
from tests.model.index_stand_in import make_index


def graphmoe(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["data", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_the_list_has_every_task_in_full(tmp_path, monkeypatch):
    """Also where the terminal is narrow: a shortened name could not be typed."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("GRAPHMOE_DATA", str(tmp_path))
    (tmp_path / "quartz").mkdir()
    status, text = graphmoe("list")
    assert status == 0
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for name, task in TASKS.items():
        counts = [f"{split}{'*' * (split == task.evaluation)} {count:,}" for split, count in task.splits.items()]
        for part in (task.title, task.choices, str(task.source), task.licence, ", ".join(counts)):
            assert part in rows[name]
    assert all(str(model.source) in rows[name] for name, model in MODELS.items())
    assert [name for name, line in rows.items() if line.count("fetched")] == ["quartz"]
    assert str(tmp_path) in text


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    folder.mkdir()
    make_index(folder, monkeypatch)
    monkeypatch.setenv("GRAPHMOE_DATA", str(tmp_path / "cache"))
    return folder


def test_a_fetch_says_where_whose_and_how(index, tmp_path):
    there = tmp_path / "my data"
    status, text = graphmoe("fetch", "quartz", "smollm2", "quartz", "--to", str(there))
    assert status == 0
    assert f"quartz: QuaRTz, in {there}/quartz\n" in text
    assert text.count("QuaRTz, in") == 1  # named twice, fetched once
    counts = ", ".join(f"{split} {count:,}" for split, count in TASKS["quartz"].splits.items())
    assert f"  {counts} questions\n" in text
    assert "by the package index: evals 3.0.1.post1; licence CC BY 4.0" in text
    assert f"  use: GRAPHMOE_DATA='{there}' graphmoe train --data quartz ..." in text
    assert f"graphmoe train --model '{there}/smollm2' --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --data quartz" in text
    assert "licence Apache-2.0" in text
    status, text = graphmoe("fetch", "smollm2", "--to", str(there))
    assert (status, "(was there, checked)" in text) == (0, True)


def test_a_fetch_goes_to_the_folder_where_names_are_looked_up(index, tmp_path):
    status, text = graphmoe("fetch", "social_iqa_small")
    assert (status, (tmp_path / "cache" / "social_iqa_small" / "test.jsonl").is_file()) == (0, True)
    assert "  use: graphmoe train --data social_iqa_small ..." in text


def test_what_goes_wrong_is_one_line_and_status_2(index, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    for words, told in (
        (("fetch", "quartz", "--to", str(file)), "cannot be written to"),
        (("fetch", "quartz", "--to", str(tmp_path / "new")), "pip cannot download evals==3.0.1.post1"),
    ):
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
        status, text = graphmoe(*words)
        assert (status, text.count("\n")) == (2, 1)
        assert text.startswith("graphmoe data fetch: error: ")
        assert told in text
