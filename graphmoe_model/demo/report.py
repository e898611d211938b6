"""What the demo found: tables on the console, and a report in Markdown with plots."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean

from rich.console import Console

from graphmoe_model.demo.commands import evaluation_command, on_a_real_model
from graphmoe_model.demo.comparison_report import (
    NO_RANKING,
    comparison_section,
    comparison_table,
    what_was_measured,
)
from graphmoe_model.demo.results import DemoResults
from graphmoe_model.demo.tables import Table, rich_table, titled_markdown
from graphmoe_tables.printing import print_whole


def print_results(results: DemoResults, console: Console) -> None:
    """Print the tables of the report to a rich console."""
    for table in _tables(results):
        print_whole(rich_table(table), console)
    console.print(_reload_sentence(results), markup=False)
    if results.comparison is not None:
        print_whole(rich_table(comparison_table(results.comparison)), console)
        console.print(f"{what_was_measured(results.comparison)} {NO_RANKING}", markup=False)


def write_report(results: DemoResults, folder: Path) -> Path:
    """Write report.md and its plots into ``folder`` (made if missing), and return the report's path.

    Each file is written beside its place and then moved there; other files in the folder are left alone.

    Raises:
        ImportError: matplotlib is not installed.
        NotADirectoryError: ``folder`` is a file.
    """
    try:
        from graphmoe_model.demo.plots import draw_plots
    except ImportError as error:
        raise ImportError("the demo's plots need matplotlib: pip install 'graphmoe[demo]'") from error
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the report needs a folder, but {folder} is a file; name another one")
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in draw_plots(results).items():
        _replace(folder / f"{name}.png", png)
    _replace(folder / "report.md", _markdown(results).encode())
    return folder / "report.md"


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- tables ----------------------------------------------------------------------------------------------------------


def _tables(results: DemoResults) -> list[Table]:
    return [_parameter_table(results), _accuracy_table(results), _load_table(results), _latency_table(results)]


def _parameter_table(results: DemoResults) -> Table:
    base, trainable = results.base_parameters, sum(results.parameters.values())

    def row(name: str, count: int) -> list[str]:
        return [name, f"{count:,}", f"{count / base:.2%}", f"{count / (base + trainable):.2%}"]

    rows = [row(name, count) for name, count in results.parameters.items()]
    rows += [row("all trainable", trainable), row("base model (frozen)", base)]
    return Table("Parameters", ("component", "parameters", "share of base", "share of total"), rows)


def _accuracy_table(results: DemoResults) -> Table:
    pairs = {skill: (before, results.accuracy_after[skill]) for skill, before in results.accuracy_before.items()}
    pairs["mean of the skills"] = (fmean(results.accuracy_before.values()), fmean(results.accuracy_after.values()))
    rows = [[name, f"{b:.1%}", f"{a:.1%}", f"{100 * (a - b):+.1f}"] for name, (b, a) in pairs.items()]
    title = f"Accuracy on {results.questions:,} held-out questions"
    return Table(title, ("skill", "before", "after", "points"), rows)


def _load_table(results: DemoResults) -> Table:
    experts = max(load.shape[1] for load in results.expert_load.values())
    header = ("layer", "round", *map(str, range(experts)))
    rows = [
        [layer, str(t), *(f"{share:.1%}" for share in shares)]
        for layer, load in results.expert_load.items()
        for t, shares in enumerate(load.tolist(), start=1)
    ]
    return Table("Expert load: share of routed tokens by expert", header, rows)


def _latency_table(results: DemoResults) -> Table:
    first = results.latency[0]
    rows = []
    for entry in results.latency:
        times = [f"{entry.literal_ms:.2f}", f"{entry.folded_ms:.2f}", f"{entry.literal_ms / entry.folded_ms:.2f}×"]
        further = entry.rounds - first.rounds
        if further:
            times.append(f"{(entry.literal_ms - first.literal_ms) / further:.2f}")
            times.append(f"{(entry.folded_ms - first.folded_ms) / further:.2f}")
        rows.append([str(entry.rounds), *times, *(() if further else ("–", "–"))])
    header = ("rounds T", "literal ms", "folded ms", "times as fast", "further round, literal", "further round, folded")
    return Table(f"Latency: {results.latency_conditions}", header, rows)


def _reload_sentence(results: DemoResults) -> str:
    difference = results.reload_difference
    what = "log-probabilities of the answers"
    same = f"the same {what}, to the bit" if difference == 0 else f"{what} that differ by at most {difference:.1e}"
    return f"Saved and loaded again, the adapter gives {same}."


# --- Markdown --------------------------------------------------------------------------------------------------------


def _markdown(results: DemoResults) -> str:
    parameters, accuracy, load, latency = map(titled_markdown, _tables(results))
    before, after = fmean(results.accuracy_before.values()), fmean(results.accuracy_after.values())
    sections = [
        "# GraphMoE demo report",
        f"GraphMoE adapters took a small base model from **{before:.1%}** to **{after:.1%}** right answers on "
        f"{results.questions:,} held-out multiple-choice questions; guessing gives 25%.",
        "> **What this is not.** The task is synthetic: the questions, the world they are about and the base model "
        "were made by this project to be small enough for a CPU. The figures show that the method trains, saves, "
        "loads and routes as it should. They are no benchmark and say nothing about real language models.",
        "## Conditions",
        titled_markdown(Table("", ("", ""), _condition_rows(results))),
        "## Parameters",
        "Trainable parameters of the adapter, against the frozen base model and against both together.",
        parameters,
        "## Accuracy",
        "Before: the base model, whose output a fresh adapter leaves as it is. It has read facts (*cat is animal*) and "
        "has learnt to find a given word in a list of options, in the same form as the questions, but nothing that "
        "needs both. After: fine-tuned on questions that do. No held-out question was seen in training, whatever the "
        "order of its options. The mean weighs every skill alike.",
        *("![Accuracy by skill](accuracy.png)", accuracy),
        "## Training loss",
        "![Training loss](loss.png)",
        "## Expert load",
        "The share of routed tokens that each expert got in each round, over the last logged steps of training. The "
        "load-balance loss pulls towards an even load and does not enforce it.",
        *("![Expert load](expert_load.png)", load),
        "## Latency",
        "One layer, computed literally and folded: the same function, so the same output. With one round there is "
        "nothing to fold and both run the same code; a difference there is the noise of the measurement. "
        "*Further round* is the mean cost in ms of each round after the first.",
        *("![Latency by rounds](latency.png)", latency),
        "## Saving and loading",
        _reload_sentence(results),
        "It was trained as `graphmoe train` trains, by the `recipe.yaml` beside it, and scored as `graphmoe eval` "
        f"scores; `{evaluation_command(results.folder)}` gives these accuracies again.",
        "## Sample questions",
        *(_markdown_example(*example) for example in results.examples),
    ]
    if results.comparison is not None:
        sections += comparison_section(results.comparison)
    sections += ["## On a real model", on_a_real_model()]
    return "\n\n".join(sections) + "\n"


def _condition_rows(results: DemoResults) -> list[list[str]]:
    seconds = [[f"time, {stage}", f"{taken:.1f} s"] for stage, taken in results.seconds.items()]
    return [["seed", str(results.seed)], *([name, text] for name, text in results.conditions.items()), *seconds]


def _markdown_example(prompt: str, right: str, before: str, after: str) -> str:
    def verdict(answer: str) -> str:
        # A base model may answer with any byte.
        shown = answer if answer.isalnum() else repr(answer)
        return f"**{shown}** ({'right' if answer == right else 'wrong'})"

    return f"```text\n{prompt}\n```\n\nRight: **{right}** · before: {verdict(before)} · after: {verdict(after)}"
