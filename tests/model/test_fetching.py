"""Fetching: pip downloads a wheel (here from a folder), one file of it is checked, and a folder is made whole or not.

Nothing here asks the network: `index_stand_in` makes the wheels.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from graphmoe_model.fetching import fetch
from graphmoe_model.fetching.wheels import download, extract
from graphmoe_model.questions import load_questions
from graphmoe_tables.tasks import MODELS, TASKS, check_fetched, data_folder, fetched_names
from tests.model.index_stand_in import CONTENT, STATEMENTS, make_index, write_wheel

FETCH = importlib.import_module("graphmoe_model.fetching.fetch")  # the package exports a function of this name


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """The stand-in of the package index, which pip is pointed at."""
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        make_index(folder, patch)
        yield folder


@pytest.fixture(scope="module")
def fetched(index, tmp_path_factory):
    """A folder into which everything was fetched."""
    folder = tmp_path_factory.mktemp("data")
    for name in fetched_names():
        assert fetch(name, folder).new
    return folder


@pytest.fixture
def own(fetched, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(fetched, tmp_path / "own"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["quartz", "social_iqa_small", "headlines"])
def test_fetched_tasks_are_there_by_name(name, fetched, monkeypatch):
    """The way from the wheel's rows to questions: nothing lost, nothing in two splits, answers as they were."""
    monkeypatch.setenv("GRAPHMOE_DATA", str(fetched))
    splits = {split: load_questions(name, split) for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in splits.items()} == TASKS[name].splits
    assert load_questions(name).questions == splits["test"].questions  # evaluated where nothing was chosen on
    questions = [question for found in splits.values() for question in found]
    assert len(set(questions)) == len(questions) == {"quartz": 80, "social_iqa_small": 50, "headlines": 30}[name]
    assert splits["train"].source == "package index: evals 3.0.1.post1, train"
    if name == "quartz":
        assert {q.label for q in questions if q.question.endswith("rose")} == {"A"}
        assert {q.label for q in questions if q.question.endswith("sank")} == {"B"}
        assert {q.choices for q in questions} == {("more", "less")}
    elif name == "headlines":
        assert {q.context for q in questions if q.label == "yes"} == set(STATEMENTS[:30:3])
        assert {q.prompt.splitlines()[1] for q in questions} == {"Question: Is this headline a joke? (no or yes)"}
    else:
        (found,) = (q for q in questions if q.context == f"{STATEMENTS[0]}." and "next" in q.question)
        assert (found.question, found.choices) == ("What will Kim do next?", ("rest", "run", "read"))
        assert found.label == "B"  # the 41st row


def test_a_question_with_both_answers_has_none(fetched):
    """QuaRTz's paragraphs, which decided, are not in the package."""
    text = "".join(path.read_text() for path in (fetched / "quartz").glob("*.jsonl"))
    assert "Something gets hot" not in text


def test_a_model_is_its_file(fetched):
    assert (fetched / "smollm2" / MODELS["smollm2"].file).read_bytes() == CONTENT["smollm2"]()


@pytest.mark.parametrize("name", ["quartz", "social_iqa_small", "headlines", "smollm2"])
def test_licence_and_source_stand_beside_the_data(name, fetched):
    row = TASKS[name] if name in TASKS else MODELS[name]
    text = (fetched / name / "README.md").read_text()
    for part in (row.licence, row.origin, row.source.member, row.source.package, row.source.sha256):
        assert part in text
    assert "unchanged" in text if name in MODELS else "Changed: put into JSON lines" in text  # CC BY asks for it
    assert (fetched / name / f"LICENSE-{row.source.package}").read_bytes() == b"A licence."


def test_sums_are_in_the_form_of_sha256sum(fetched):
    folder = fetched / "quartz"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    for line in lines:
        found, name = line.split("  ")
        assert found == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["quartz", "smollm2"])
def test_a_second_fetch_asks_nobody(name, own, monkeypatch):
    monkeypatch.setattr(FETCH, "download", None)
    before = content(own / name)
    done = fetch(name, own)
    assert (done.new, done.folder) == (False, own / name)
    assert content(own / name) == before


@pytest.mark.parametrize("spoilt", ["train.jsonl", "README.md"])
def test_damage_is_mended(spoilt, own, fetched):
    path = own / "quartz" / spoilt
    path.write_bytes(path.read_bytes()[:-10])
    told: list[str] = []
    assert fetch("quartz", own, told.append).new
    assert any("is damaged or of another version and is made again" in text for text in told)
    assert content(own / "quartz") == content(fetched / "quartz")  # and two fetches give the same bytes
    assert [path.name for path in own.glob(".*")] == []


def test_what_another_version_fetched_is_made_again(own, monkeypatch):
    """Else its splits, whole by their sums, would be refused when they are loaded, and never replaced."""
    row = TASKS["quartz"]
    monkeypatch.setitem(TASKS, "quartz", row._replace(licence="another"))
    assert fetch("quartz", own).new
    assert "Licence: another." in (own / "quartz" / "README.md").read_text()


def test_a_task_that_was_edited_is_not_taken_for_the_task(own, monkeypatch):
    monkeypatch.setenv("GRAPHMOE_DATA", str(own))
    path = own / "quartz" / "test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"test\.jsonl has \d+ questions, and QuaRTz's test has \d+: it was changed"):
        load_questions("quartz")


def test_a_task_that_was_not_fetched_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHMOE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=f"quartz is not in {tmp_path}: run graphmoe data fetch quartz, or set GRAPHM"):
        load_questions("quartz")


def test_the_folder_is_chosen_by_variables(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("GRAPHMOE_DATA", "~/data")
    assert data_folder() == Path.home() / "data"
    monkeypatch.delenv("GRAPHMOE_DATA")
    assert data_folder() == Path("/cache/graphmoe")
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as good as unset, says the standard
    assert data_folder() == Path.home() / ".cache" / "graphmoe"


# --- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, told",
    [
        ("quarz", "nothing to fetch is called 'quarz', did you mean 'quartz'?; there are quartz, social_iqa_small"),
        ("boolq", "boolq comes from the hub, when it is named; fetched from the package index are quartz"),
    ],
)
def test_unknown_names_are_refused(name, told):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        check_fetched([name])


def test_what_pip_says_is_passed_on(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"pip cannot download evals==3\.0\.1\.post1: .*No matching .*PIP_FIND_LINKS=F"
    ):
        fetch("quartz", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_wheel_is_downloaded_without_what_it_depends_on(index, tmp_path):
    """The packages ask for gigabytes of others, none of which is needed for a file."""
    (path,) = [download(TASKS["quartz"].source, tmp_path)]
    assert [path] == list(tmp_path.iterdir())


def test_an_environment_without_pip_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="this Python has none: python -m ensurepip"):
        fetch("quartz", tmp_path)


def spoil_truncated(source, folder):
    path = write_wheel(folder, source.package, source.version, {source.member: b"a" * 5000})
    path.write_bytes(path.read_bytes()[:3000])
    return path


def spoil_bytes(source, folder):
    path = write_wheel(folder, source.package, source.version, {source.member: b"a" * 5000, source.licence_member: b""})
    path.write_bytes(path.read_bytes().replace(b"a" * 100, b"b" * 100, 1))
    return path


def spoil_another(source, folder):
    return write_wheel(folder, source.package, source.version, {source.member: b"a", source.licence_member: b""})


def spoil_none(source, folder):
    return write_wheel(folder, source.package, source.version, {"evals/other": b"a"})


@pytest.mark.parametrize(
    "spoil, told",
    [
        (spoil_truncated, "is damaged (File is not a zip file); try again, or without pip's cache: pip cache purge"),
        (spoil_bytes, "is damaged (Bad CRC-32"),
        (spoil_another, "its SHA-256 is ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"),
        (spoil_none, "has no There is no item named 'evals/registry/data/quartz/samples.jsonl'"),
    ],
)
def test_a_wheel_that_is_not_the_pinned_one_leaves_nothing(spoil, told, tmp_path, monkeypatch):
    monkeypatch.setattr(FETCH, "download", lambda source, folder: spoil(source, folder))
    with pytest.raises(ValueError, match=re.escape(told)):
        fetch("quartz", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_splits_that_came_out_otherwise_are_refused(index, tmp_path, monkeypatch):
    """Results on them could not be compared with those of other machines."""
    monkeypatch.setitem(TASKS, "quartz", TASKS["quartz"]._replace(splits={"train": 1, "validation": 2, "test": 3}))
    with pytest.raises(ValueError, match=r"the splits of quartz came out as .*'test': 3\} are expected"):
        fetch("quartz", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "quartz").mkdir()
    (tmp_path / "quartz" / "train.jsonl").write_text("mine")
    with pytest.raises(
        ValueError, match=r"quartz is there and was not made by graphmoe data fetch; name another folder"
    ):
        fetch("quartz", tmp_path)
    assert content(tmp_path / "quartz") == {"train.jsonl": b"mine"}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=f"{file}.* cannot be written to: .*; name another folder by --to"):
        fetch("quartz", file / "below")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / ".quartz-1"))

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)  # modes do not bind root, as which tests may run
    with pytest.raises(ValueError, match=r"\.quartz-1 cannot be written to: Permission denied; name another folder"):
        fetch("quartz", tmp_path)


def test_a_full_disk_is_told_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(FETCH, "download", None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(ValueError, match=f"MB are needed in {tmp_path}, 0 are free; name another by --to"):
        fetch("smollm2", tmp_path)


def interrupted(*args):
    raise KeyboardInterrupt


def test_an_interrupted_fetch_leaves_nothing(index, tmp_path, monkeypatch):
    monkeypatch.setattr(FETCH, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("smollm2", tmp_path)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def never_removed(**options):
    """A temporary folder as it is after kill -9."""
    yield tempfile.mkdtemp(**options)


def test_a_killed_fetch_is_no_fetch(index, tmp_path, monkeypatch):
    """Half a folder would be taken for data. What the killed one left goes when it is surely nobody's."""
    with monkeypatch.context() as patch:
        patch.setattr(FETCH, "extract", interrupted)
        patch.setattr("tempfile.TemporaryDirectory", never_removed)
        with pytest.raises(KeyboardInterrupt):
            fetch("smollm2", tmp_path)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".smollm2-")
    os.utime(left, (0, 0))
    young = tmp_path / ".smollm2-of-a-running-fetch"
    young.mkdir()
    assert fetch("smollm2", tmp_path).new
    assert {path.name for path in tmp_path.iterdir()} == {"smollm2", young.name}


def test_extracting_checks_the_file_itself(index, tmp_path):
    source = TASKS["quartz"].source
    (wheel,) = index.glob("evals-*.whl")
    extract(wheel, source, tmp_path / "rows", tmp_path / "licence")
    assert (tmp_path / "rows").read_bytes() == CONTENT["quartz"]()
