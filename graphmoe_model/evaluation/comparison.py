"""Runs side by side, in the form of PEFT's ``method_comparison``: one record per run, and a page that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from graphmoe_model.evaluation.paired import paired_lines
from graphmoe_model.evaluation.records import RIGHT
from graphmoe_model.presentation import markdown_table

_COMPARED = ("questions", "questions_sha256", "first_token_accuracy", RIGHT, "acc", "acc_norm")  # of each task


def method_record(evaluation: dict[str, Any], training: dict[str, Any] | None = None) -> dict[str, Any]:
    """Make one record of an evaluation and of the training before it, with the sections and names that PEFT's results
    have: ``run_info``, ``train_info``, ``meta_info``.

    Args:
        evaluation: what `evaluation_document` returns.
        training: what `graphmoe train` wrote (``train_result.json``); None: what the evaluation holds of it, if any.

    Raises:
        ValueError: it is no evaluation's.
    """
    check_evaluation(evaluation, "the document")
    tasks, conditions = evaluation["tasks"], evaluation["conditions"]
    training = evaluation.get("training") if training is None else training
    metrics = [
        {"split": "test", "task": name, **{key: value for key, value in scores.items() if key != RIGHT}}
        for name, scores in tasks.items()
    ]
    train_info: dict[str, Any] = {"status": "success" if training else "no training known"}
    if training:
        train_info |= {
            "train_time": training.get("seconds"),
            "accelerator_memory_max": training.get("peak_memory"),
            "num_trainable_params": training.get("trainable_parameters"),
            "file_size": training.get("adapter_bytes"),
            "train_loss": training.get("last_loss"),
            "steps": training.get("steps"),
        }
    return {
        "run_info": {
            "experiment_name": conditions.get("name"),
            "created_at": conditions.get("created_at"),
            "peft_config": conditions.get("adapter_settings"),
            "seed": (training or {}).get("conditions", {}).get("seed"),
        },
        "train_info": {**train_info, "num_total_params": conditions.get("parameters"), "metrics": metrics},
        "meta_info": {
            "model_info": {"model_id": conditions.get("model"), "sha": conditions.get("model_revision")},
            "package_info": conditions.get("versions"),
            "system_info": {"device": conditions.get("device"), "threads": conditions.get("threads")},
            "commit": conditions.get("commit"),
        },
    }


def check_evaluation(document: dict[str, Any], name: str) -> None:
    """`ValueError` that names a document which is no evaluation's and says what it seems to be, or one whose tasks lack
    a score."""
    missing = [part for part in ("tasks", "conditions") if not isinstance(document.get(part), dict)]
    if missing:
        seems = "is what graphmoe train wrote" if "trainable_parameters" in document else "is no evaluation"
        raise ValueError(
            f"{name} {seems}: it has no {' and no '.join(missing)}; name a JSON file that graphmoe eval wrote"
        )
    for task, scores in document["tasks"].items():
        lacking = [part for part in _COMPARED if not isinstance(scores, dict) or part not in scores]
        if lacking:
            raise ValueError(
                f"{name} has no {' and no '.join(lacking)} of {task}: it was written by an earlier version or changed "
                "since; evaluate again"
            )


def comparison_page(evaluations: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown page: accuracies of each run by task, how far each is from the first run on the same
    questions, what its training took, and where runs were evaluated otherwise than the first.

    Raises:
        ValueError: fewer than two runs, runs without a common task, or whose questions of a task are others.
    """
    if len(evaluations) < 2:
        raise ValueError(f"a comparison needs at least two evaluations, got {len(evaluations)}")
    records = [method_record(evaluation) for evaluation in evaluations]
    names = [str(record["run_info"]["experiment_name"]) for record in records]
    scores = [evaluation["tasks"] for evaluation in evaluations]
    tasks = [task for task in scores[0] if all(task in own for own in scores)]
    if not tasks:
        raise ValueError(
            "the evaluations have no task in common: "
            + "; ".join(f"{name} has {', '.join(own) or 'none'}" for name, own in zip(names, scores, strict=True))
        )
    for task in tasks:
        _check_same_questions(task, names, [own[task] for own in scores])
    runs = list(zip(names, records, scores, strict=True))
    lines = ["# Comparison", "", "First-token accuracy in percent, with its standard error.", ""]
    rows = [[name, *(_accuracy(own[task]) for task in tasks)] for name, _, own in runs]
    if len(tasks) > 1:
        for row, (_, _, own) in zip(rows, runs, strict=True):
            row.append(_mean([own[task]["first_token_accuracy"] for task in tasks]))
    lines += markdown_table(["run", *tasks, *(["average"] if len(tasks) > 1 else [])], rows)
    lines += paired_lines(names, tasks, scores)
    lines += ["", "Log-likelihood of the choices' texts: acc / acc_norm in percent.", ""]
    rows = [
        [name, *(f"{100 * own[task]['acc']:.1f} / {100 * own[task]['acc_norm']:.1f}" for task in tasks)]
        for name, _, own in runs
    ]
    lines += markdown_table(["run", *tasks], rows)
    lines += ["", "What training took.", ""]
    header = ["run", "seconds", "peak memory, GB", "trainable parameters", "adapter, MB", "last loss"]
    lines += markdown_table(header, [[name, *_costs(record["train_info"])] for name, record, _ in runs])
    lines += ["", "Conditions.", ""]
    rows = [
        [
            name,
            str(record["meta_info"]["model_info"]["model_id"]),
            str(record["meta_info"]["system_info"]["device"]),
            ", ".join(f"{own[task]['questions']:,}" for task in tasks),
        ]
        for name, record, own in runs
    ]
    lines += markdown_table(["run", "base model", "device", "questions"], rows)
    lines += _differences(names, [evaluation["conditions"] for evaluation in evaluations])
    left_out = sorted({task for own in scores for task in own} - set(tasks))
    if left_out:
        lines += ["", f"Not in every evaluation, so left out: {', '.join(left_out)}."]
    return "\n".join(lines) + "\n"


# Conditions that change what an accuracy means; the questions themselves are held by their digest.
_MEANING = (
    "shots",
    "examples",
    "seed",
    "samples",
    "temperature",
    "max_length",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
)


def _check_same_questions(task: str, names: Sequence[str], metrics: Sequence[dict[str, Any]]) -> None:
    """`ValueError` if two runs answered other questions under a task's name."""
    for part, what in (("questions", "{:,} questions"), ("questions_sha256", "questions with the SHA-256 {:.12}")):
        first = metrics[0][part]
        for name, metric in zip(names, metrics, strict=True):
            if metric[part] != first:
                raise ValueError(
                    f"{names[0]} and {name} answered other questions as {task}: {what.format(first)} and "
                    f"{what.format(metric[part])}; evaluate both on the same file or split, with the same --limit"
                )


def _differences(names: Sequence[str], conditions: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each condition in which runs differ, so that figures do not stand side by side as if they were of one
    kind."""
    lines = []
    for key in _MEANING:
        values = [own.get(key) for own in conditions]
        if key == "seed" and not any(own.get("shots") or own.get("samples") for own in conditions):
            continue  # nothing is drawn
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{'none' if v is None else v} in {n}" for n, v in zip(names, values, strict=True))
            lines.append(f"- {key}: {shown}")
    return ["", "**Not evaluated alike**, so the accuracies above are not of one kind:", "", *lines] if lines else []


def _accuracy(metric: dict[str, Any]) -> str:
    error = metric.get("stderr")
    return f"{100 * metric['first_token_accuracy']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _mean(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.1f}"


def _costs(info: dict[str, Any]) -> list[str]:
    shown = {
        "train_time": lambda value: f"{value:,.0f}",
        "accelerator_memory_max": lambda value: f"{value / 1e9:.2f}",
        "num_trainable_params": lambda value: f"{value:,}",
        "file_size": lambda value: f"{value / 1e6:.1f}",
        "train_loss": lambda value: f"{value:.4g}",
    }
    return ["–" if info.get(name) is None else show(info[name]) for name, show in shown.items()]
