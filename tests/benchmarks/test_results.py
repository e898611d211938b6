"""Result files: one schema for all, what is none is refused in words, and a run's file is whole at every moment."""

from __future__ import annotations

import json

import pytest

from benchmarks.document import RESULTS, SCHEMA, Document, Ratio, ResultError, Source, every, load, turn_ratio
from benchmarks.page import page
from tests.benchmarks.made_up import CPU, document, in_turns, row, saved

COMMITTED = sorted(RESULTS.rglob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_committed_result_is_read_and_shown(path):
    """Docs quote them: a reader that forgot one of them would leave a figure without its source."""
    content = load(path)
    text = page([Source(path, content)])
    assert content["conditions"]["device"]["name"] in text
    for section, names in (("rows", ("label",)), ("kernels", ("kernel",)), ("profiles", ("adapter", "phase"))):
        assert all(str(entry[name]) in text for entry in content[section] for name in names)


def test_committed_results_are_what_a_report_is_made_of():
    sources, passed_over = every(RESULTS)
    assert passed_over == []
    assert sorted(source.path for source in sources) == COMMITTED
    dates = [source.content["conditions"]["date"] for source in sources]
    assert dates == sorted(dates, reverse=True)


def test_a_result_comes_back_as_it_was_written(tmp_path):
    """What a run saves is what the report reads, rows and conditions alike."""
    written = Document(tmp_path / "r.json")
    written.content |= document([row("triton", 1.0)])
    written.save()
    assert load(tmp_path / "r.json") == written.content
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_process_leaves_a_whole_file(tmp_path):
    """The step that was running is known to the next process, which does not run into it again."""
    first = Document(tmp_path / "r.json")
    first.content["rows"].append(row("triton", 1.0))
    first.begin("hangs")
    again = Document(tmp_path / "r.json")
    assert again.content == first.content
    assert again.attempted("hangs")
    assert again.close_interrupted() == ["hangs"]
    assert again.content["steps"]["hangs"]["state"] == "failed"


def test_a_skipped_step_is_run_by_the_next_process(tmp_path):
    """What one process had no time for, another may have."""
    found = Document(tmp_path / "r.json")
    found.end("large", "skipped", note="no time left")
    assert not found.attempted("large")
    found.end("large", "done", 1.234)
    assert found.attempted("large")
    assert found.content["steps"]["large"] == {"state": "done", "seconds": 1.23, "note": ""}


def test_a_run_does_not_go_on_with_a_file_of_another_schema(tmp_path):
    """Rows of two schemas in one file could be read by nobody."""
    with pytest.raises(ResultError, match="has version 1, expected is schema 2"):
        Document(saved(tmp_path, {"version": 1, "steps": {}}))


def without(section, key):
    entries = {
        "rows": row("triton", 1.0),
        "kernels": {"operator": "gru", "kernel": "k", "round": "first", "tokens": 1, "experts": 8, "seconds": {}},
        "profiles": {"model": "m", "adapter": "a", "phase": "decode", "tokens": 1, "seconds": {}},
    }
    entry = {name: value for name, value in entries[section].items() if name != key}
    return json.dumps(document(**{section: [entry]}))


OTHERS = {
    "has version 1, expected is schema 2: run the benchmarks again": json.dumps({"version": 1, "layers": []}),
    "has schema 3, expected is schema 2": json.dumps({"schema": 3}),
    "has version 2, expected is schema 2": json.dumps({"version": SCHEMA}),
    "has no schema number, expected is schema 2": json.dumps({"device": {}, "groups": []}),
    "is what `graphmoe profile` wrote": json.dumps({"conditions": {}, "profiles": []}),
    "is no JSON": "# GPU report",
    "it holds a list, not an object": "[]",
    "'rows' is missing": json.dumps({key: value for key, value in document().items() if key != "rows"}),
    "'rows' is a dict": json.dumps(document() | {"rows": {}}),
    "device kind, device name missing": json.dumps(document(device={})),
    "versions, commit, date, device kind, device name missing": json.dumps(document() | {"conditions": {}}),
    "has no rows: its run measured nothing \\(it began no step\\)": json.dumps(document()),
    "measured nothing \\(2 steps failed\\)": json.dumps(
        document(steps={"a": {"state": "failed"}, "b": {"state": "failed"}})
    ),
    "row 0 has no group": without("rows", "group"),
    "row 0 has no sizes tokens": json.dumps(
        document([row("triton", 1.0, sizes={"experts": 8, "rounds": 1, "dtype": "bf16"})])
    ),
    "kernel 0 has no round, seconds median": without("kernels", "round"),
    "profile 0 has no phase": without("profiles", "phase"),
    "row 1 is a str": json.dumps(document([row("triton", 1.0), "row"])),
    "row 0 took 0 s, expected is a positive time": json.dumps(document([row("triton", 0)])),
    "two rows 'triton, T=3' of case": json.dumps(document([row("triton", 1.0), row("triton", 2.0)])),
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_is_no_result_is_refused_in_words(tmp_path, message):
    """A figure must never come from a file that is misread."""
    path = tmp_path / "r.json"
    path.write_text(OTHERS[message])
    with pytest.raises(ResultError, match=message) as refused:
        load(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_paths_that_cannot_be_read_are_refused(tmp_path):
    """No traceback for a typing error, a folder, or a file of bytes."""
    with pytest.raises(ResultError, match=r"none\.json: no such file"):
        load(tmp_path / "none.json")
    with pytest.raises(ResultError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "plot.json").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ResultError, match="is no JSON"):
        load(tmp_path / "plot.json")


def test_all_results_of_a_folder_are_found_and_the_rest_named(tmp_path):
    """By the date in the file: names and times of files say little after a checkout. Old schemas are not hidden."""
    (tmp_path / "parts").mkdir()
    for name, device, date in (("b", CPU, "2026-11-01"), ("a", CPU, "2026-11-02"), ("parts/c", None, "2026-10-01")):
        content = document([row("triton", 1.0)], device)
        content["conditions"]["date"] = f"{date}T00:00:00+00:00"
        saved(tmp_path, content, f"{name}.json")
    saved(tmp_path, {"version": 1}, "old.json")
    sources, passed_over = every(tmp_path)
    assert [source.path.name for source in sources] == ["a.json", "b.json", "c.json"]
    assert len(passed_over) == 1
    assert "old.json has version 1" in passed_over[0]


def test_ratios_are_those_of_the_turns_in_either_direction():
    """The inverse of a ratio has the inverse range, in order; rows of two cases have no ratio turn by turn."""
    fast, slow = row("triton", 1.0), row("dense", 2.0)
    in_turns(fast, slow)
    fast["ratios"] = {}
    slow["ratios"] = {"triton, T=3": {"median": 2.0, "range": [1.6, 2.5]}}
    assert turn_ratio(slow, fast) == Ratio(2.0, (1.6, 2.5))
    assert turn_ratio(fast, slow) == Ratio(0.5, (0.4, 0.625))
    assert turn_ratio(fast, {**slow, "case": "another"}) is None
    assert turn_ratio(fast, {**slow, "ratios": {}}) is None
    assert str(Ratio(0.5, (0.4, 0.625))) == "0.500 [0.400, 0.625]"
