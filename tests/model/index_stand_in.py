"""A folder that pip takes for a package index, with made-up wheels in the form of those that questions come from."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from graphmoe_model.fetching.rows import READERS
from graphmoe_model.fetching.splits import own_splits
from graphmoe_tables.tasks import MODELS, TASKS, PackagedModel, Task, WheelFile

# Statements that have no word in common, so that each is a group of its own.
STATEMENTS = [f"Zor{i} puts kettle{i} under snow{i} by night{i}" for i in range(40)]


def quartz_rows() -> bytes:
    """Forty pairs of questions that differ in a word, and one question that is there with both answers."""
    rows = [(f"{text}, it {how}", answer) for text in STATEMENTS for how, answer in (("rose", "A"), ("sank", "B"))]
    rows += [("Something gets hot. It moves", "A"), ("Something gets hot. It moves", "B")]
    return _lines([{"input": [_message("Answer."), _message(_quartz(q))], "ideal": a} for q, a in rows])


def social_rows() -> bytes:
    """Forty contexts, of which ten have two questions."""
    rows = [f"{context}. How would Kim feel? A: sad; B: glad; C: cold." for context in STATEMENTS]
    rows += [f"{context}. What will Kim do next? A: rest; B: run; C: read." for context in STATEMENTS[::4]]
    return _lines([{"input": [_message(text)], "ideal": "ABC"[i % 3]} for i, text in enumerate(rows)])


def headline_rows() -> bytes:
    """Thirty headlines, every third one a joke, of which one is there twice."""
    rows = [(text, str(int(i % 3 == 0))) for i, text in enumerate(STATEMENTS[:30])]
    return _lines([{"input": [_message("1 or 0."), _message(text)], "ideal": a} for text, a in [*rows, rows[0]]])


def _quartz(question: str) -> str:
    return f"{question}\n\n A: more\n B: less"


def _message(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _lines(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


CONTENT = {
    **{"quartz": quartz_rows, "social_iqa_small": social_rows, "headlines": headline_rows},
    "smollm2": lambda: b"GGUF" + bytes(range(256)) * 40,
}


def make_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the folder, point pip to it and to nothing else, and let the tables ask for what is in it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    members: dict[tuple[str, str, str], dict[str, bytes]] = {}
    for name, make in CONTENT.items():
        table: dict[str, Task] | dict[str, PackagedModel] = TASKS if name in TASKS else MODELS
        row = table[name]
        source, content = row.source, make()
        assert isinstance(source, WheelFile)
        wheel = members.setdefault((source.package, source.version, source.licence_member), {})
        wheel[source.member] = content
        source = source._replace(sha256=hashlib.sha256(content).hexdigest(), size=len(content), download=len(content))
        row = row._replace(source=source)
        if isinstance(row, Task):
            rows = folder / "rows"
            rows.write_bytes(content)
            row = row._replace(splits={split: len(own) for split, own in own_splits(READERS[name](rows)).items()})
            rows.unlink()
        monkeypatch.setitem(table, name, row)  # type: ignore[arg-type]
    for (package, version, licence), files in members.items():
        write_wheel(folder, package, version, {**files, licence: b"A licence."})


def write_wheel(folder: Path, package: str, version: str, files: dict[str, bytes]) -> Path:
    """Write a wheel that pip accepts, and that depends on one which is nowhere."""
    name = f"{package.replace('-', '_')}-{version}"
    wheel = b"Wheel-Version: 1.0\nGenerator: made-up\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: nowhere-to-be-found\n"
    about = {
        f"{name}.dist-info/METADATA": metadata.encode(),
        f"{name}.dist-info/WHEEL": wheel,
        f"{name}.dist-info/RECORD": b"",
    }
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**files, **about}.items():
            archive.writestr(member, content)
    return path
