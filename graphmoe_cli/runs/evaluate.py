"""What ``graphmoe eval`` does: read the questions, load the model, score it, print and write the scores."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import torch
from peft import PeftConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_cli.evaluate_options import EvaluateOptions
from graphmoe_cli.runs.terminal import hide_loading_bars, progress
from graphmoe_model.base_models import Bits, ModelSource, check_base, load_base_model, load_tokenizer
from graphmoe_model.evaluation import EvaluationTask, SelfConsistency, TaskResult, evaluate_questions
from graphmoe_model.evaluation.adapters import attach_adapter, saved_config
from graphmoe_model.evaluation.document import (
    adapter_settings,
    averages,
    conditions_of,
    evaluation_document,
    training_result,
    write_document,
    write_records,
)
from graphmoe_model.evaluation.overwriting import EVALUATION, check_overwriting
from graphmoe_model.evaluation.standard import check_reachable, evaluate_standard
from graphmoe_model.machine import chosen_device
from graphmoe_model.questions import QuestionSet, load_questions, load_sets
from graphmoe_tables.printing import print_whole
from graphmoe_tables.tasks import TASKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(options: EvaluateOptions, console: Console) -> list[TaskResult]:
    """Evaluate, print the table and write the files.

    Raises:
        ValueError: whatever is wrong with an option, the questions, the model or the adapter; all but what only the
            tokenizer and the weights can show before the model is loaded.
    """
    hide_loading_bars()
    start = time.perf_counter()
    device = chosen_device(options.device)
    bits: Bits | None = 4 if options.load_in_4bit else 8 if options.load_in_8bit else None
    source = ModelSource(options.model, options.gguf_file, bits, DTYPES.get(options.dtype), str(device))
    config = None if options.adapter is None else saved_config(options.adapter)
    if config is not None and not options.allow_other_base:
        check_base(config, str(options.adapter), options.model)
    training = None if options.adapter is None else training_result(options.adapter)
    check_reachable(options.tasks)
    tasks, sources = _tasks(options)
    asked = _asked(options, config, sources)
    check_overwriting(options.output, EVALUATION, asked)
    tokenizer = load_tokenizer(source)
    model: Any = load_base_model(source)
    if config is not None:
        model = attach_adapter(model, str(options.adapter), config)
    results: list[TaskResult] = []
    standard: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {"batch_size": options.batch_size, "max_length": options.max_length, "seed": options.seed}
    if tasks:
        with progress("questions") as told:
            results = evaluate_questions(
                model,
                tokenizer,
                tasks,
                shots=options.shots,
                self_consistency=_sampling(options),
                progress=told,
                **common,
            )
    if options.tasks:
        shots = options.shots or None
        with progress("lm-eval's tasks") as told:
            standard = evaluate_standard(
                model, tokenizer, options.tasks, shots=shots, limit=options.limit, progress=told, **common
            )
    conditions = {**conditions_of(model, device), **asked}
    conditions["seconds"] = round(time.perf_counter() - start, 2)
    write_document(evaluation_document(results, standard, conditions, training), options.output)
    if options.records is not None:
        write_records(results, options.records)
    _print(options, results, standard, console)
    return results


def _tasks(options: EvaluateOptions) -> tuple[list[EvaluationTask], dict[str, str]]:
    """The tasks with their examples, and where each was read."""
    tasks, sources = [], {}
    for given, (name, found) in zip(options.data, load_sets(options.data, options.split).items(), strict=True):
        asked = found.questions[: options.limit]
        if options.shots:
            examples = _examples(options, given)
            tasks.append(
                EvaluationTask(name, asked, examples.questions, options.examples or f"{name}:{examples.split}")
            )
        else:
            tasks.append(EvaluationTask(name, asked))
        sources[name] = found.source
    return tasks, sources


def _examples(options: EvaluateOptions, given: str) -> QuestionSet:
    if options.examples is not None:
        return load_questions(options.examples, "train")
    task = given.partition(":")[0]
    if task not in TASKS:
        raise ValueError(
            f"--shots {options.shots}: {given} is a file, which has no training split; name where examples come from "
            "by --examples"
        )
    return load_questions(f"{task}:train")


def _sampling(options: EvaluateOptions) -> SelfConsistency | None:
    if options.samples is None:
        return None
    given = {} if options.temperature is None else {"temperature": options.temperature}
    return SelfConsistency(options.samples, seed=options.seed, **given)


def _asked(options: EvaluateOptions, config: PeftConfig | None, sources: dict[str, str]) -> dict[str, Any]:
    """What the command was asked for, for the JSON's conditions."""
    sampling = _sampling(options)
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": options.model,
        "gguf_file": options.gguf_file,
        "load_in_4bit": options.load_in_4bit,
        "load_in_8bit": options.load_in_8bit,
        "adapter": options.adapter,
        "adapter_settings": None if config is None else adapter_settings(config),
        "data": sources,
        "tasks": list(options.tasks),
        "shots": options.shots,
        "examples": options.examples,
        "samples": options.samples,
        "temperature": None if sampling is None else sampling.temperature,
        "batch_size": options.batch_size,
        "limit": options.limit,
        "max_length": options.max_length,
        "seed": options.seed,
    }


def _print(
    options: EvaluateOptions, results: list[TaskResult], standard: dict[str, dict[str, Any]], console: Console
) -> None:
    what = options.model if options.adapter is None else f"{options.adapter} on {options.model}"
    if results:
        console.print(Text(f"{what}, accuracy in percent"), soft_wrap=True)
        print_whole(_table(results, options.samples), console)
        cut = sum(result.truncated_prompts for result in results)
        if cut:
            prompts = 2 * sum(result.questions for result in results)
            line = f"{cut:,} of {prompts:,} prompts (two per question) were too long and lost their start"
            console.print(Text(line), soft_wrap=True)
    if standard:
        console.print(Text(f"{what}, by lm-eval's own tasks"), soft_wrap=True)
        print_whole(_standard_table(standard), console)
    console.print(Text(f"JSON: {options.output}"), soft_wrap=True)


def _table(results: list[TaskResult], samples: int | None) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("task")
    for name in ("questions", "first token", "± stderr", "acc", "acc_norm"):
        table.add_column(name, justify="right")
    if samples is not None:
        table.add_column(f"majority of {samples}", justify="right")
    rows: list[tuple[str, str, dict[str, Any]]] = [(r.task, f"{r.questions:,}", r.as_dict()) for r in results]
    if len(results) > 1:
        rows.append(("average", "", averages(results)))
    for name, questions, scores in rows:
        keys = ["first_token_accuracy", "stderr", "acc", "acc_norm"]
        keys += [] if samples is None else ["self_consistency_accuracy"]
        table.add_row(Text(name), questions, *(_percent(scores[key]) for key in keys))
    return table


def _standard_table(standard: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE)
    for name, justify in (("task", "left"), ("metric", "left"), ("value", "right"), ("± stderr", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for task, metrics in standard.items():
        for name, value in metrics.items():
            if name != "questions" and "_stderr" not in name:
                metric, comma, filtered = name.partition(",")
                error = metrics.get(f"{metric}_stderr{comma}{filtered}")
                table.add_row(Text(task), Text(name), f"{value:.4f}", "–" if error is None else f"{error:.4f}")
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
