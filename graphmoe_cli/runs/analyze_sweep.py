"""What ``graphmoe analyze sensitivity``, ``parameters`` and ``activated`` do: train, ask, print, draw, write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphmoe_cli.analyze_options import SweepOptions
from graphmoe_cli.pictures import drawn
from graphmoe_cli.runs.terminal import hide_loading_bars, say_written
from graphmoe_model.analysis import sweeps
from graphmoe_model.analysis.statistics import percent
from graphmoe_model.analysis.sweep import Sweep, fitted_recipe, run_sweep
from graphmoe_model.analysis.sweep_report import SettingResult, document_of, results_of
from graphmoe_model.evaluation.document import write_document
from graphmoe_model.presentation import short_model
from graphmoe_model.questions import QuestionSet, load_questions, load_sets
from graphmoe_tables.printing import print_whole
from graphmoe_tables.recipe import TrainingRecipe

PLANS = {"sensitivity": sweeps.sensitivity, "parameters": sweeps.parameters, "activated": sweeps.activated}
TITLES = {
    "sensitivity": "Accuracy and time by rounds and GRU",
    "parameters": "Accuracy and time by trained parameters",
    "activated": "Accuracy and time by experts per token",
}


def run(options: SweepOptions, console: Console) -> list[SettingResult]:
    """Run what is missing of a sweep, print its table and write its files.

    Raises:
        ValueError: whatever is wrong with an option, the recipe, the questions, the model or the folder.
    """
    hide_loading_bars()
    recipe = fitted_recipe(options.recipe)
    asked = load_sets(options.test_data or recipe.data)
    train = tuple(load_questions(name, "train") for name in recipe.data)
    if not options.test_data:
        _check_others(train, asked)
    if options.limit is not None:
        asked = {task: replace(own, questions=own.questions[: options.limit]) for task, own in asked.items()}
    plan = PLANS[options.kind](recipe, **options.grid)  # type: ignore[operator]
    sweep = Sweep(options.kind, recipe, plan.settings, plan.series, options.seeds or (recipe.seed,), train, asked)
    documents = run_sweep(sweep, options.out, lambda line: console.print(Text(line), soft_wrap=True))
    results = results_of(sweep, documents)
    document = document_of(sweep, results, documents)
    write_document(document, options.out / f"{options.kind}.json")
    files = [f"{options.kind}.json"]
    if drawn(options.plot):
        from graphmoe_model.analysis.sweep_plot import draw_sweep  # needs matplotlib, an extra

        described = (
            f"{recipe.gguf_file or short_model(recipe.model)}; {sum(len(own.questions) for own in asked.values()):,} "
            f"questions of {', '.join(asked)}; {_seeds(sweep)}; {_length(recipe)}; {_machine(document)}"
        )
        path = options.out / f"{options.kind}.png"
        files += draw_sweep(TITLES[options.kind], results, plan.series, described, path)
    _print(results, list(asked), console)
    if document["varied"]:
        differing = "; ".join(f"{name} {' and '.join(values)}" for name, values in document["varied"].items())
        console.print(Text(f"Not all runs were made alike, so compare them with care: {differing}."), soft_wrap=True)
    say_written(options.out, files, options.plot, console)
    return results


def _check_others(train: tuple[QuestionSet, ...], asked: dict[str, QuestionSet]) -> None:
    """Refuse to ask what was trained on: a file has one split."""
    for own in train:
        if any(own.source == other.source for other in asked.values()):
            raise ValueError(
                f"the recipe trains on {own.source}, which has no other questions to ask; name some by --test-data"
            )


def _seeds(sweep: Sweep) -> str:
    if len(sweep.seeds) == 1:
        return "1 seed, so no intervals"
    return f"{len(sweep.seeds)} seeds, bars are 95% intervals as far as accuracies go"


def _length(recipe: TrainingRecipe) -> str:
    rows = recipe.batch * recipe.accumulation
    steps = f"{recipe.epochs:g} epochs" if recipe.max_steps is None else f"{recipe.max_steps:,} steps"
    return f"{steps} of {rows} rows"


def _machine(document: dict[str, Any]) -> str:
    """Say on what the runs were made, all of it where they were not made alike."""
    conditions, varied = document["conditions"], document["varied"]
    dtypes, devices = (" and ".join(varied.get(name, [conditions[name]])) for name in ("dtype", "device"))
    versions = " and ".join(varied.get("torch's version", [conditions["versions"]["torch"]]))
    return f"{dtypes}, {devices}, torch {versions}"


def _print(results: list[SettingResult], tasks: list[str], console: Console) -> None:
    table = Table(box=box.SIMPLE)
    table.add_column("setting")
    averaged = ["average"] if len(tasks) > 1 else []
    for name in ("seeds", *tasks, *averaged, "s per step", "ms per question", "parameters"):
        table.add_column(name, justify="right")
    for own in results:
        accuracies = [percent(own.accuracy[task]) if task in own.accuracy else "diverged" for task in tasks]
        if averaged:
            accuracies.append("diverged" if own.average is None else percent(own.average))
        table.add_row(
            Text(own.title),
            str(len(own.seeds)) + (f", {len(own.diverged)} diverged" if own.diverged else ""),
            *accuracies,
            "–" if own.step_seconds is None else f"{own.step_seconds:.3g}",
            "–" if own.question_seconds is None else f"{1000 * own.question_seconds:.3g}",
            "–" if own.trainable_parameters is None else f"{own.trainable_parameters:,}",
        )
    print_whole(table, console)
    console.print(
        Text("Right answers by the first token in percent, ± the half of the 95% interval over seeds (Student's t).")
    )
