"""Results are not written over by those of something else: hours of answers would be gone without a word."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from graphmoe_model.evaluation.document import read_document


class Kind(NamedTuple):
    """A kind of results.

    Attributes:
        name: what messages call it.
        whose: of its conditions, those that say of what it is, and on what: another one is not written over.
        instead: what to do where there is another one.
    """

    name: str
    whose: tuple[str, ...]
    instead: str


EVALUATION = Kind(
    "evaluation",
    ("model", "gguf_file", "load_in_4bit", "load_in_8bit", "adapter", "data", "tasks"),
    "name another --output, or move that file away",
)
BALANCE = Kind(
    "balance", ("model", "gguf_file", "adapters", "data"), "name another --out, or move its files and pictures away"
)
TRACE = BALANCE._replace(name="trace", whose=(*BALANCE.whose, "text"))
LATENCY = BALANCE._replace(name="latency", whose=("files", "devices", "models", "adapters"))
COMPOSITION = LATENCY._replace(name="composition")


def check_overwriting(path: Path, kind: Kind, conditions: Mapping[str, Any]) -> None:
    """Refuse a file that holds something else than earlier results of the same kind, of the same model and adapter on
    the same tasks; how many of their questions, in what form, may differ.

    Args:
        path: where the results will be written.
        kind: of results.
        conditions: those of them that are known before they are made, at least the kind's ``whose``.

    Raises:
        ValueError: says what the file holds.
    """
    if not path.exists():
        return
    strange = ValueError(f"{path} holds something else than an earlier {kind.name}; {kind.instead}")
    try:
        earlier = read_document(path, "another file").get("conditions")
    except ValueError as error:
        raise strange from error
    if not isinstance(earlier, dict) or any(name not in earlier for name in kind.whose):
        raise strange
    if any(_plain(earlier[name]) != _plain(conditions[name]) for name in kind.whose):
        raise ValueError(
            f"{path} holds the {kind.name} of {_whose(earlier)}, and this one is of {_whose(conditions)}; "
            f"{kind.instead}"
        )


def _plain(value: Any) -> Any:
    """A condition as it is compared: paths by where they lead, tasks by their names, none at all as what is unset."""
    if isinstance(value, dict | list | tuple):
        return sorted(map(_resolved, value), key=str) or None
    return _resolved(value) or None


def _resolved(value: Any) -> Any:
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def _whose(conditions: Mapping[str, Any]) -> str:
    """Say of what results are, and on what."""
    if "files" in conditions:
        files, devices, models, adapters = (", ".join(conditions[name]) for name in LATENCY.whose)
        return f"{files} ({models} with {adapters}, {devices})" if models else f"{files} ({devices})"
    model = [str(conditions["model"])]
    model += [str(conditions["gguf_file"])] if conditions.get("gguf_file") else []
    model += [f"in {bits} bits" for bits in (4, 8) if conditions.get(f"load_in_{bits}bit")]
    adapter = conditions["adapter"] if "adapter" in conditions else " and ".join(conditions["adapters"])
    whose = f"{' '.join(model)} without an adapter" if adapter is None else f"{' '.join(model)} with {adapter}"
    asked = [*(conditions.get("data") or ()), *(conditions.get("tasks") or ())]
    return f"{whose} on {', '.join([*asked, *(repr(text) for text in conditions.get('text', ()))])}"
