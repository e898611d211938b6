"""The eight tasks' datasets in a cache of the hub's client, with the schemas of their cards and rows of our own.

Everything runs as with the hub but for the download: the client finds the commit, the snapshot and its files itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, List, Value

from graphmoe_tables.tasks import TASKS, HubSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = Value("string")
LISTED = {"text": List(TEXT), "label": List(TEXT)}
SCHEMAS = {
    "arc_easy": {"id": TEXT, "question": TEXT, "choices": LISTED, "answerKey": TEXT},
    "arc_challenge": {"id": TEXT, "question": TEXT, "choices": LISTED, "answerKey": TEXT},
    "boolq": {"question": TEXT, "answer": Value("bool"), "passage": TEXT},
    "openbookqa": {"id": TEXT, "question_stem": TEXT, "choices": LISTED, "answerKey": TEXT},
    "piqa": {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": ClassLabel(names=["0", "1"])},
    "social_iqa": dict.fromkeys(("context", "question", "answerA", "answerB", "answerC", "label"), TEXT),
    "hellaswag": {
        **{"ind": Value("int32"), "activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "ctx": TEXT},
        **{"endings": List(TEXT), "source_id": TEXT, "split": TEXT, "split_type": TEXT, "label": TEXT},
    },
    "winogrande": dict.fromkeys(("sentence", "option1", "option2", "answer"), TEXT),
}


def arc_row(answer: str, labels: str = "ABCD", **changed: Any) -> dict[str, Any]:
    choices = {"text": [f"stone {label}" for label in labels], "label": list(labels)}
    return {"id": "x", "question": "Which stone floats?", "choices": choices, "answerKey": answer, **changed}


def hellaswag_row(label: str, **changed: Any) -> dict[str, Any]:
    texts = {"activity_label": "Baking", "ctx_a": "She mixes flour.", "ctx_b": "then", "ctx": "She mixes flour. then"}
    about = {"ind": 4, "source_id": "made~up", "split": "train", "split_type": "indomain"}
    endings = ["she bakes.", "she swims.", "it rains.", "he sings."]
    return {**texts, **about, "endings": endings, "label": label, **changed}


def social_row(label: str) -> dict[str, Any]:
    choices = {"answerA": "sad", "answerB": "glad", "answerC": "cold"}
    return {"context": "Kim won a cup.", "question": "How would Kim feel?", **choices, "label": label}


def wino_row(answer: str, sentence: str = "The cup did not fit the box, as the _ was too big.") -> dict[str, Any]:
    return {"sentence": sentence, "option1": "cup", "option2": "box", "answer": answer}


def piqa_row(label: int) -> dict[str, Any]:
    return {"goal": "To dry a cup,", "sol1": "wipe it with a towel.", "sol2": "fill it with water.", "label": label}


def boolq_row(answer: bool | None) -> dict[str, Any]:
    return {"question": "is a cup a vessel", "answer": answer, "passage": "A cup is a small vessel."}


ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [arc_row("C"), arc_row("2", "1234"), arc_row("E", "ABCDE"), arc_row("B", "ABC")],
    "arc_challenge": [arc_row("A"), arc_row("4", "1234")],
    "boolq": [boolq_row(True), boolq_row(False)],
    "openbookqa": [{"id": "y", "question_stem": "Water is", "choices": arc_row("D")["choices"], "answerKey": "D"}],
    "piqa": [piqa_row(0), piqa_row(1)],
    "social_iqa": [social_row("1"), social_row("2"), social_row("3")],
    "hellaswag": [hellaswag_row("0"), hellaswag_row("3")],
    "winogrande": [wino_row("1"), wino_row("2")],
}


def put(cache: Path, name: str, split: str, rows: list[dict[str, Any]], schema: dict[str, Any] | None = None) -> Path:
    """Write rows as the hub's client keeps the split of a task, and return the file."""
    source = TASKS[name].source
    assert isinstance(source, HubSource)
    repository = cache / f"datasets--{source.repository.replace('/', '--')}"
    ref = repository / "refs" / source.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(COMMIT)
    file = repository / "snapshots" / COMMIT / source.configuration / split / "0000.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    features = Features(schema or SCHEMAS[name])
    columns = {field: [row[field] for row in rows] for field in features}
    Dataset.from_dict(columns, features=features).to_parquet(file)
    return file
