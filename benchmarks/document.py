"""Result files: the schema, the document that grows during a run, and reading it back.

A result is one JSON object. Whoever wrote it, on whatever device, it has:

    schema      2, the number of this description
    conditions  device {kind, name, ...}, versions {package: version}, commit, date (UTC, ISO 8601); more may follow
    limits      what the device did in the same run: copy bytes a second, matrix operations a second, ... (may be empty)
    steps       {name: {state: done | failed | skipped | running, seconds, note}}, by the names of the cases
    checks      [{case, provider, label, tokens, dtype, passed, fault, largest error, plain computation's own}]
    rows        [{case, group, model, mode, graph, provider, label, sizes, seconds, ratios, ...}]: timed in turns, by
                seconds {median, quartiles, best, turns} and ratios {label of another of the case: {median, range}}
    kernels     [{operator, kernel, round, tokens, experts, dtype, seconds, ...}]: each kernel alone
    profiles    [{model, adapter, phase, tokens, seconds {part: s}}]: where the time of a forward goes

A reader takes what it knows and leaves the rest. A further key needs no new number; a changed meaning does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 2
RUN_AGAIN = "run the benchmarks again (`make bench`, or `make gpu-report` on a GPU)"
LISTS = ("checks", "rows", "kernels", "profiles")
# What a row is judged and drawn by, and kernels and profiles are shown by; the other keys may be missing.
KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "rows": {
        **dict.fromkeys(("case", "group", "model", "mode", "graph", "provider", "label", "ratios"), ()),
        "sizes": ("experts", "rounds", "tokens", "dtype"),
        "seconds": ("median", "quartiles"),
    },
    "kernels": {**dict.fromkeys(("operator", "kernel", "round", "tokens", "experts"), ()), "seconds": ("median",)},
    "profiles": dict.fromkeys(("model", "adapter", "phase", "tokens", "seconds"), ()),
}
# Providers of the frozen MLP with or without LoRA: one computation at any T.
WITHOUT_ROUNDS = ("dense", "peft_lora", "liger")


class ResultError(ValueError):
    """A file that holds no result of this schema, or results that cannot stand beside each other."""


class Source(NamedTuple):
    """A result and the file it came from."""

    path: Path
    content: dict[str, Any]


class Ratio(NamedTuple):
    """One row's figure over another's."""

    value: float  # the median over the turns, or the ratio of two medians
    range: tuple[float, float] | None = None  # lowest and highest over the turns, where there is a ratio turn by turn

    def __str__(self) -> str:
        if self.range is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.range[0]:.3f}, {self.range[1]:.3f}]"

    def overlaps(self, other: Ratio) -> bool:
        """Whether the ranges have a point in common."""
        (low, high), (other_low, other_high) = (each.range or (each.value,) * 2 for each in (self, other))
        return low <= other_high and other_low <= high


class Document:
    """What a run has found so far, on disk after every step.

    The file is replaced, never written into: a run that is killed leaves what the last step saved. A run that starts
    again on the same file goes on after the steps that it names.

    Args:
        path: the file; None for a document that is kept in memory.

    Attributes:
        content: as the schema has it.

    Raises:
        ResultError: the file is there, but is no result of this schema.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {"schema": SCHEMA, "conditions": {}, "limits": {}, "steps": {}}
        self.content |= {name: [] for name in LISTS}
        if path is not None and path.exists():
            self.content = _parse(path)

    @property
    def measured(self) -> bool:
        """Whether anything was found."""
        return any(self.content[name] for name in LISTS)

    def save(self) -> None:
        """Write all of it, where there is a path."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)

    def begin(self, step: str) -> None:
        """Note that a step runs: should it end the process, the next process passes it over."""
        self.content["steps"][step] = {"state": "running"}
        self.save()

    def end(self, step: str, state: str, seconds: float = 0.0, note: str = "") -> None:
        """Note how a step ended: ``"done"``, ``"failed"`` or ``"skipped"``, with the reason."""
        self.content["steps"][step] = {"state": state, "seconds": round(seconds, 2), "note": note}
        self.save()

    def attempted(self, step: str) -> bool:
        """Whether a step has run, or was running when a process ended."""
        return step in self.content["steps"] and self.content["steps"][step]["state"] != "skipped"

    def close_interrupted(self) -> list[str]:
        """Mark the steps that were running when a process ended as failed, and name them."""
        names = [name for name, step in self.content["steps"].items() if step["state"] == "running"]
        for name in names:
            self.content["steps"][name] = {"state": "failed", "note": "the process ended, or was ended, in this step"}
        return names


def load(path: Path) -> dict[str, Any]:
    """The content of a result file, its conditions and rows complete.

    Raises:
        ResultError: no such file, no JSON, another schema, no conditions, nothing measured, or a row that lacks what
            every row has.
    """
    content = _parse(path)
    if (fault := next(_faults(content), None)) is not None:
        raise ResultError(f"{path} {fault}; {RUN_AGAIN}")
    return content


def _faults(content: dict[str, Any]) -> Iterator[str]:
    """What a whole file of the schema lacks of a result."""
    conditions = content["conditions"]
    absent = [key for key in ("versions", "commit", "date") if key not in conditions]
    absent += [f"device {key}" for key in ("kind", "name") if key not in conditions.get("device", {})]
    if absent:
        yield f"does not say where it was measured ({', '.join(absent)} missing)"
    if not (content["rows"] or content["kernels"] or content["profiles"]):
        states = [step["state"] for step in content["steps"].values()]
        ends = [f"{states.count(state)} steps {state}" for state in dict.fromkeys(states)] or ["it began no step"]
        yield f"has no rows: its run measured nothing ({', '.join(ends)})"
    for section, keys in KEYS.items():
        for index, entry in enumerate(content[section]):
            what = f"is damaged: {section.removesuffix('s')} {index}"
            if not isinstance(entry, dict):
                yield f"{what} is a {type(entry).__name__}, expected is an object"
                continue
            absent = [key for key in keys if key not in entry]
            absent += [f"{key} {name}" for key in keys if key in entry for name in keys[key] if name not in entry[key]]
            if absent:
                yield f"{what} has no {', '.join(absent)}"
            elif "median" in keys.get("seconds", ()) and "refused" not in entry:
                median = entry["seconds"]["median"]
                if not (isinstance(median, (int, float)) and median > 0):
                    yield f"{what} took {median!r} s, expected is a positive time"
    names = [(row["case"], row["label"]) for row in content["rows"]]
    for case, label in names:
        if names.count((case, label)) > 1:
            yield f"has two rows {label!r} of case {case!r}, expected is one"


def turn_ratio(over: dict[str, Any], under: dict[str, Any]) -> Ratio | None:
    """Time of one row over that of another, turn by turn; None unless they were timed in turns with each other."""
    if over["case"] != under["case"]:
        return None
    if (found := over["ratios"].get(under["label"])) is not None:
        return Ratio(found["median"], (found["range"][0], found["range"][1]))
    if (found := under["ratios"].get(over["label"])) is not None:
        low, high = found["range"]
        return Ratio(1 / found["median"], (1 / high, 1 / low))
    return None


def conditions_line(content: dict[str, Any]) -> str:
    """Device, versions, commit (with the mark of a tree that differed) and day of a result."""
    c = content["conditions"]
    versions = [f"{name} {c['versions'][name]}" for name in ("torch", "triton") if name in c["versions"]]
    commit = c["commit"][:10] + "+" * (len(c["commit"]) > 10 and c["commit"].endswith("+"))
    return ", ".join([c["device"]["name"], *versions, f"commit {commit}", c["date"][:10]])


def every(folder: Path) -> tuple[list[Source], list[str]]:
    """The results in a folder and its folders, the newest first, and a line for each file that is none."""
    found, passed_over = [], []
    for path in sorted(folder.rglob("*.json")):
        try:
            found.append(Source(path, load(path)))
        except ResultError as error:
            passed_over.append(str(error))
    return sorted(found, key=lambda source: source.content["conditions"]["date"], reverse=True), passed_over


def _parse(path: Path) -> dict[str, Any]:
    """A result file of this schema, in whatever state its run left it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultError(f"{path}: no such file") from None
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of JSON and of UTF-8
        raise ResultError(f"{path} is no JSON ({error}): name a result file of the benchmarks") from error
    if not isinstance(content, dict):
        raise ResultError(f"{path} is no result file: it holds a {type(content).__name__}, not an object")
    if content.get("schema") != SCHEMA:
        if "schema" not in content and "profiles" in content:
            raise ResultError(f"{path} is what `graphmoe profile` wrote, not the benchmarks: name a result of theirs")
        named = [f"{key} {content[key]}" for key in ("schema", "version") if key in content]
        raise ResultError(f"{path} has {(named or ['no schema number'])[0]}, expected is schema {SCHEMA}: {RUN_AGAIN}")
    for key, kind in {**dict.fromkeys(("conditions", "limits", "steps"), dict), **dict.fromkeys(LISTS, list)}.items():
        if not isinstance(content.get(key), kind):
            found = f"is a {type(content[key]).__name__}" if key in content else "is missing"
            raise ResultError(f"{path} is damaged: {key!r} {found}, expected is a {kind.__name__}; {RUN_AGAIN}")
    return content
