"""What a sweep found: by setting, as JSON takes it, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from graphmoe_model.analysis.statistics import Estimate, over_seeds
from graphmoe_model.analysis.sweep import Documents, Setting, Sweep


class SettingResult(NamedTuple):
    """What a setting came to.

    Attributes:
        setting: its name.
        title: in tables.
        seeds: those that did not diverge.
        diverged: those that did.
        accuracy: task -> share of right answers by the first token, a mean over seeds with its interval.
        average: the same of the mean over tasks.
        step_seconds: of a training step, in the run that other work disturbed least; None for the base model.
        question_seconds: of an answer, in the same way.
        trainable_parameters: of the adapter.
        load_variation: of each round, a mean over seeds; None without routers.
    """

    setting: str
    title: str
    seeds: list[int]
    diverged: list[int]
    accuracy: dict[str, Estimate]
    average: Estimate | None
    step_seconds: float | None
    question_seconds: float | None
    trainable_parameters: int | None
    load_variation: list[float] | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        average = None if self.average is None else self.average._asdict()
        accuracy = {task: own._asdict() for task, own in self.accuracy.items()}
        return {**self._asdict(), "accuracy": accuracy, "average": average}


def results_of(sweep: Sweep, documents: Documents) -> list[SettingResult]:
    """Return what each setting came to, in the sweep's order."""
    found = []
    for setting in sweep.settings:
        own = {seed: document for (name, seed), document in documents.items() if name == setting.name}
        found.append(_of_setting(setting, own, list(sweep.asked)))
    return found


def document_of(sweep: Sweep, results: Sequence[SettingResult], documents: Documents) -> dict[str, Any]:
    """Return a sweep's JSON: its description, what each setting came to, the lines of its picture, the conditions.

    Those are of the last run that answered, and under ``varied`` all values of what differs between the runs: a sweep
    may have been gone on with on another machine.
    """
    conditions = _of_answers(documents)
    return {
        "sweep": sweep.described(),
        "results": [own.as_dict() for own in results],
        "series": [{**own._asdict(), "points": list(own.points.items())} for own in sweep.series],
        "conditions": conditions[-1],
        "varied": _varied(conditions),
        "commits": sorted({own["commit"] for own in conditions if own.get("commit")}),
    }


def _of_answers(documents: Documents) -> list[dict[str, Any]]:
    """The conditions of the runs that answered; a diverged one has none but its time. The base model always answers."""
    return [own["conditions"] for own in documents.values() if "device" in own["conditions"]]


def _varied(conditions: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is not the same in all runs of a sweep though it could be -> its values, the first run's first."""
    flat = [
        {**own, **{f"{name}'s version": version for name, version in own.get("versions", {}).items()}}
        for own in conditions
    ]
    own_of_each = ("created_at", "parameters", "versions", "commit")  # commits have a list of their own
    names = dict.fromkeys(name for own in flat for name in own if name not in own_of_each)
    values = {name: list(dict.fromkeys(str(own.get(name, "none")) for own in flat)) for name in names}
    return {name: own for name, own in values.items() if len(own) > 1}


def _of_setting(setting: Setting, documents: Mapping[int, Mapping[str, Any]], tasks: Sequence[str]) -> SettingResult:
    done = {seed: document for seed, document in documents.items() if document["diverged"] is None}
    shares = {task: [_share(document["right"][task]) for document in done.values()] for task in tasks}
    means = [fmean(own) for own in zip(*shares.values(), strict=True)]
    steps = [document["seconds"]["per_step"] for document in done.values()]
    answers = [document["seconds_per_question"] for document in done.values()]
    loads = [document["load_variation"] for document in done.values()]
    return SettingResult(
        setting=setting.name,
        title=setting.title,
        seeds=list(done),
        diverged=[seed for seed in documents if seed not in done],
        accuracy={task: over_seeds(own) for task, own in shares.items() if own},
        average=over_seeds(means) if means else None,
        step_seconds=min((own for own in steps if own is not None), default=None),
        question_seconds=min(answers, default=None),
        trainable_parameters=next((document["trainable_parameters"] for document in done.values()), None),
        load_variation=[fmean(own) for own in zip(*loads, strict=True)] if loads and None not in loads else None,
    )


def _share(marks: str) -> float:
    return marks.count("1") / len(marks)
