"""The tables of docs/study.md, and the sentences about what they lack, from the results alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from experiments.study.plan import (
    Undecided,
    accuracy,
    chosen_rate,
    run_of,
    seeds_text,
    slots,
    validation_accuracy,
)
from experiments.study.results import Results, StudyError
from experiments.study.settings import TEST, Method, Rate, Run
from experiments.study.statistics import over_questions
from graphmoe_model.analysis.statistics import Estimate, over_seeds, percent, signed
from graphmoe_model.presentation import markdown_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "study.md"
CONDITIONS = ("device", "threads", "dtype", "commit")
PACKAGES = ("torch", "transformers", "peft")


class Found(NamedTuple):
    """The results of a method on a task at its chosen rate.

    Attributes:
        rate: the chosen one; None for the base model.
        by_seed: seed -> result; runs that diverged are left out.
        diverged: the seeds of those.
    """

    rate: Rate | None
    by_seed: dict[int, Mapping[str, Any]]
    diverged: tuple[int, ...]


def section(results: Results) -> str:
    """Return the part's section: what is complete, then for each task the tables."""
    part = results.part
    lines = [f"## {part.title}", "", *_completeness(results), ""]
    if not len(results):
        return "\n".join(lines).rstrip() + "\n"
    for task in part.tasks:
        found = {method.name: found_of(task, method, results) for method in part.methods}
        if not any(own is not None and own.by_seed for own in found.values()):
            continue
        lines += [f"### {task}", "", *_accuracies(task, found, results), ""]
        for reference in part.references:
            lines += _differences(reference, found, results)
        lines += [*_costs(found, results), ""]
        lines += _rates(task, results)
    return "\n".join(lines).rstrip() + "\n"


def write_into(page: Path, sections: Mapping[str, str]) -> None:
    """Put each part's section between its marks in a page.

    Raises:
        StudyError: the page cannot be read, or a part's marks are not in it once.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{page} cannot be read: {error.strerror}") from error
    for name, content in sections.items():
        start, end = f"<!-- study: {name} -->", f"<!-- /study: {name} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise StudyError(f"{page} must have the marks {start} and {end} once, with nothing of worth between them")
        block = f"{start}\n\n{content}\n{end}"
        text = pattern.sub(block.replace("\\", r"\\"), text)
    page.write_text(text, encoding="utf-8")


def found_of(task: str, method: Method, results: Results) -> Found | None:
    """Return a method's results at its chosen rate; None where the rate is not chosen yet, or nothing was run."""
    rate = chosen_rate(task, method, results) if method.trained else None
    if isinstance(rate, Undecided):
        return None
    runs = {seed: results.of(Run(results.part, task, method, rate, seed)) for seed in results.part.seeds_of(method)}
    by_seed = {seed: result for seed, result in runs.items() if result is not None and result["diverged"] is None}
    diverged = tuple(seed for seed, result in runs.items() if result is not None and result["diverged"] is not None)
    return Found(rate, by_seed, diverged) if by_seed or diverged else None


def _completeness(results: Results) -> list[str]:
    """Sentences on what there is and what is missing."""
    part = results.part
    lines = []
    for task in part.tasks:
        complete, missing = [], []
        for method in part.methods:
            found = found_of(task, method, results)
            seeds = 0 if found is None else len(found.by_seed) + len(found.diverged)
            wanted = len(part.seeds_of(method))
            if seeds == wanted:
                complete.append(method.title)
            else:
                open_rate = ", its rate is not chosen" if found is None and method.trained else ""
                missing.append(f"{method.title} ({seeds} of {wanted}{open_rate})")
        seeds_text = "1 seed" if len(part.seeds) == 1 else f"{len(part.seeds)} seeds"
        line = f"- **{task}**: {len(complete)} of {len(part.methods)} methods have all of their runs with {seeds_text}."
        lines.append(line if not missing else f"{line} Missing, seeds done: {'; '.join(missing)}.")
    planned = [run_of(slot, results) for slot in slots(part)]
    done = sum(isinstance(run, Run) and results.of(run) is not None for run in planned)
    lines += ["", f"Of {len(planned)} runs {done} are done, those that choose the rates among them."]
    if len(results):
        lines[-1] += f" Conditions: {'; '.join(_conditions(results))}."
    return [piece for line in lines for piece in wrapped(line)]


def _conditions(results: Results) -> list[str]:
    """Where and with what the runs ran: every value that one of them has."""
    conditions = [result["conditions"] for result in results.all() if result["diverged"] is None]
    told = [(key, {str(own[key]) for own in conditions}) for key in CONDITIONS]
    told += [(package, {str(own["versions"].get(package)) for own in conditions}) for package in PACKAGES]
    return [f"{name} {', '.join(sorted(values))}" for name, values in told if values]


def _accuracies(task: str, found: Mapping[str, Found | None], results: Results) -> list[str]:
    """Test accuracy of every method, over all questions and by group."""
    groups = _groups(found)
    rows = []
    for method in results.part.methods:
        own = found[method.name]
        if own is None or not own.by_seed:
            rows.append([method.title, "–", "0", *["–" for _ in groups]])
            continue
        tested = [result["right"][TEST] for result in own.by_seed.values()]
        per_group = [percent(over_seeds([accuracy({group: right[group]}) for right in tested])) for group in groups]
        whole = [] if len(groups) == 1 else [percent(over_seeds([accuracy(right) for right in tested]))]
        seeds = f"{len(tested)}" + (f" ({len(own.diverged)} diverged)" if own.diverged else "")
        rows.append([method.title, "–" if own.rate is None else own.rate.title, seeds, *whole, *per_group])
    wide = len(groups) > 1
    for row in rows:
        row += ["–"] * (3 + len(groups) + wide - len(row))
    titles = ["all", *groups] if wide else ["accuracy"]
    text = (
        "Test accuracy in percent by the first token of the answer: the mean over seeds, with the half of its 95% "
        "interval over seeds (Student's t)."
    )
    return [*wrapped(text), "", *markdown_table(["method", "learning rate", "seeds", *titles], rows)]


def _differences(reference: str, found: Mapping[str, Found | None], results: Results) -> list[str]:
    """Differences of each method to one, paired by seed; nothing where the reference has no results."""
    part, base, groups = results.part, found[reference], _groups(found)
    if base is None or not base.by_seed:
        return []
    rows = []
    for method in part.methods:
        own = found[method.name]
        if method.name == reference or own is None:
            continue
        pairs = _pairs(own, base)
        if not pairs:
            continue
        low, high = over_questions(*([_joined(result) for result in side] for side in zip(*pairs, strict=True)))
        questions = f"{100 * low:+.1f} to {100 * high:+.1f}"
        per_group = [signed(_difference(pairs, [group])) for group in groups] if len(groups) > 1 else []
        rows.append([method.title, f"{len(pairs)}", signed(_difference(pairs, groups)), questions, *per_group])
    if not rows:
        return []
    title = part.method(reference).title
    text = (
        f"Accuracy less that of {title}, in points, paired by seed: with the half of the 95% interval over seeds, and "
        "the 95% interval over questions (bootstrap)."
    )
    titles = ["method", "pairs", "difference", "over questions", *(groups if len(groups) > 1 else ())]
    return [*wrapped(text), "", *markdown_table(titles, rows), ""]


def _difference(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], groups: Sequence[str]) -> Estimate:
    """The mean over seeds of the difference in test accuracy, on some groups of questions."""
    sides = [[accuracy({group: side["right"][TEST][group] for group in groups}) for side in pair] for pair in pairs]
    return over_seeds([one - other for one, other in sides])


def _pairs(own: Found, base: Found) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Results of the same seed; one that is the same for all seeds stands beside each of the other's."""
    if own.rate is None and len(own.by_seed) == 1:
        return [(next(iter(own.by_seed.values())), other) for other in base.by_seed.values()]
    if base.rate is None and len(base.by_seed) == 1:
        return [(one, next(iter(base.by_seed.values()))) for one in own.by_seed.values()]
    return [(one, base.by_seed[seed]) for seed, one in own.by_seed.items() if seed in base.by_seed]


def _costs(found: Mapping[str, Found | None], results: Results) -> list[str]:
    """Load, time and size."""
    rows = []
    for method in results.part.methods:
        own = found[method.name]
        if own is None or not own.by_seed or not method.trained:
            continue
        every = list(own.by_seed.values())
        loads = [each["load_variation"] for each in every if each["load_variation"] is not None]
        load = " / ".join(f"{fmean(values):.2f}" for values in zip(*loads, strict=True)) if loads else "–"
        timed = [each["seconds"]["per_step"] for each in every if each["seconds"]["per_step"] is not None]
        seconds = f"{min(timed) * results.part.recipe['max_steps']:,.0f}" if timed else "–"
        rows.append([method.title, load, seconds, f"{every[0]['trainable_parameters']:,}"])
    if not rows:
        return []
    text = (
        "Load: the coefficient of variation of the experts' shares by round (0: balanced), at the end of training. "
        f"Seconds: of {results.part.recipe['max_steps']} steps of training, in the run that other work disturbed least."
    )
    return [*wrapped(text), "", *markdown_table(["method", "load by round", "seconds", "trained parameters"], rows)]


def _rates(task: str, results: Results) -> list[str]:
    """Validation accuracy at each rate of the grid, with the seeds that choose."""
    part = results.part
    lines: list[str] = []
    for method in part.methods:
        cells = []
        for rate in sorted(method.rates, key=lambda rate: (rate.learning_rate, rate.gru_factor or 0)):
            reached = validation_accuracy(task, method, rate, results)
            if not isinstance(reached, Undecided):
                cells.append(f"{rate.title}: {reached if isinstance(reached, str) else format(100 * reached, '.1f')}")
        if cells:
            lines += wrapped(f"- {method.title}: {'; '.join(cells)}.")
    if not lines:
        return []
    text = f"Validation accuracy in percent by learning rate, with {seeds_text(part.choosing)}: the highest is above."
    return [*wrapped(text), "", *lines, ""]


def _groups(found: Mapping[str, Found | None]) -> list[str]:
    """The groups of test questions, in a fixed order."""
    results = [result for own in found.values() if own is not None for result in own.by_seed.values()]
    return sorted({group for result in results for group in result["right"][TEST]})


def _joined(result: Mapping[str, Any]) -> str:
    """All of a result's test marks, groups in a fixed order."""
    right = result["right"][TEST]
    return "".join(right[group] for group in sorted(right))


def wrapped(text: str, width: int = 118) -> Sequence[str]:
    """Break a text into lines; an item of a list goes on indented."""
    lines, indent = [""], "  " if text.startswith("- ") else ""
    for word in text.split(" "):
        if len(lines[-1]) + 1 + len(word) > width and lines[-1].strip():
            lines.append(indent + word)
        else:
            lines[-1] += (" " if lines[-1].strip() else "") + word
    return lines
