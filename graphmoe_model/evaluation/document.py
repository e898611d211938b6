"""An evaluation as JSON: the scores, and under which conditions they were found."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from graphmoe_model.checkout import checked_out_commit
from graphmoe_model.evaluation.records import TaskResult
from graphmoe_model.machine import device_name, installed_version
from graphmoe_model.whole_files import write_whole

PACKAGES = ("graphmoe", "torch", "triton", "transformers", "peft", "lm_eval", "tokenizers", "datasets", "bitsandbytes")
# What train_result.json is called beside an adapter that `graphmoe train` made.
TRAINING_RESULT = "train_result.json"


def evaluation_document(
    results: Sequence[TaskResult],
    standard: dict[str, dict[str, Any]],
    conditions: dict[str, Any],
    training: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return an evaluation's JSON.

    Args:
        results: of our own tasks.
        standard: of lm-eval's, by `evaluate_standard`.
        conditions: by `conditions_of`, with what the command was asked for.
        training: what `graphmoe train` wrote beside the adapter, if it made it.
    """
    document: dict[str, Any] = {"tasks": {result.task: result.as_dict() for result in results}}
    if len(results) > 1:
        document["average"] = averages(results)
    if standard:
        document["lm_eval_tasks"] = standard
    document["conditions"] = conditions
    if training is not None:
        document["training"] = training
    return document


def averages(results: Sequence[TaskResult]) -> dict[str, float | None]:
    """Return the mean of each score over the tasks, each task counting once, and the standard error of the first."""
    count = len(results)
    names = ("first_token_accuracy", "acc", "acc_norm", "self_consistency_accuracy")
    found: dict[str, float | None] = {}
    for name in names:
        values = [getattr(result, name) for result in results]
        if None not in values:
            found[name] = fmean(values)
    errors = [result.stderr for result in results]
    known = [error for error in errors if error is not None]
    found["stderr"] = math.sqrt(math.fsum(error**2 for error in known)) / count if len(known) == count else None
    return found


def conditions_of(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Say where and with what a model is evaluated: device, dtype, threads, versions, commit.

    The dtype is that of most of the weights: the base's, as an adapter has more tensors of its own and fewer weights.
    """
    weights: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            weights[parameter.dtype] += parameter.numel()
    return {
        "device": device_name(device),
        "dtype": str(weights.most_common(1)[0][0]).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_revision": getattr(model.config, "_commit_hash", None),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := installed_version(package)) is not None},
        "commit": checked_out_commit(),
    }


def adapter_settings(config: PeftConfig) -> dict[str, Any]:
    """Return an adapter's settings as JSON takes them, those that are not set left out."""
    settings = {name: value for name, value in config.to_dict().items() if value not in (None, [], {}, ())}
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def training_result(adapter: str) -> dict[str, Any] | None:
    """Return what `graphmoe train` wrote beside an adapter; None if it wrote nothing.

    Raises:
        ValueError: the file is no JSON object.
    """
    path = Path(adapter) / TRAINING_RESULT
    return read_document(path, "a result of graphmoe train") if path.is_file() else None


def read_document(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file that should be ``what``; ``ValueError`` if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; name {what}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); name {what}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}; name {what}")
    return found


def write_document(document: dict[str, Any], path: Path) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_records(results: Iterable[TaskResult], path: Path) -> None:
    """Write one JSON line per question, with its task."""
    lines = [
        json.dumps({"task": result.task, **record.as_dict()}, ensure_ascii=False)
        for result in results
        for record in result.records
    ]
    write_whole(path, "\n".join(lines) + "\n")
