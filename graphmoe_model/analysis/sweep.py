"""A sweep: one recipe at several settings and seeds, each trained and asked once, gone on with where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from graphmoe_model.analysis.base_digest import base_digest
from graphmoe_model.analysis.differences import differences
from graphmoe_model.analysis.one_process import alone
from graphmoe_model.analysis.one_run import marks, run_once
from graphmoe_model.analysis.statistics import MOST_SEEDS
from graphmoe_model.base_models import ModelSource, load_base_config
from graphmoe_model.evaluation.document import read_document, write_document
from graphmoe_model.questions import QuestionSet, count_shared, questions_digest
from graphmoe_model.training.models import adapter_config, base_source
from graphmoe_model.training.run import fitted
from graphmoe_model.training.run_folder import checkpoints, remove
from graphmoe_tables.recipe import FREE_ON_RESUME, TrainingRecipe

SWEEP_FILE, RUNS, ADAPTERS, LOCK = "sweep.json", "runs", "adapters", ".lock"
SETS = {"train": "trained on", "asked": "asked"}
BASE = "base"  # the setting that is the base model as it is
BATCH = 16  # prompts per forward


class Setting(NamedTuple):
    """One setting of a sweep.

    Attributes:
        name: in file names.
        title: in tables.
        changes: fields of the recipe; None for the base model as it is.
    """

    name: str
    title: str
    changes: Mapping[str, Any] | None


class Series(NamedTuple):
    """A line of the picture.

    Attributes:
        title: of the line.
        axis: what its places are of.
        points: place -> the setting's name.
    """

    title: str
    axis: str
    points: dict[float, str]


@dataclass(frozen=True)
class Sweep:
    """What is run, on which questions.

    Attributes:
        kind: ``"sensitivity"``, ``"parameters"`` or ``"activated"``.
        recipe: what all settings start from, `graphmoe_model.training.run.fitted`; its output and seed are not used.
        settings: what is run, each with every seed, the base model once.
        series: how they are shown.
        seeds: at least one.
        train: to train on.
        asked: task -> its questions.

    Raises:
        ValueError: no seed, one twice or out of range, more than intervals are known for; a recipe that reports to a
            service; a setting that no adapter can be trained by on this base; or a process of several.
    """

    kind: str
    recipe: TrainingRecipe
    settings: tuple[Setting, ...]
    series: tuple[Series, ...]
    seeds: tuple[int, ...]
    train: tuple[QuestionSet, ...]
    asked: Mapping[str, QuestionSet]

    def __post_init__(self) -> None:
        told_apart = 1 <= len(set(self.seeds)) == len(self.seeds) <= MOST_SEEDS
        if not told_apart or not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(
                f"--seeds must be 1 to {MOST_SEEDS} different numbers of 0 to {2**32 - 1}, got {list(self.seeds)}"
            )
        if self.recipe.report_to not in ("auto", "none"):
            raise ValueError(
                f"a sweep reports to no one, and the recipe has report_to: {self.recipe.report_to}; leave it out, or "
                "set it to none"
            )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("a sweep runs in one process; start it without torchrun and accelerate launch")
        base = load_base_config(base_source(self.recipe)).get_text_config()
        for setting in self.settings:  # what a recipe or a configuration refuses is said before hours are spent
            if setting.changes is None:
                continue
            try:
                config = adapter_config(self.recipe_of(setting, self.seeds[0], Path("unused")))
                config.gru_width(base.hidden_size)
                config.experts_by_layer(base.num_hidden_layers)
            except ValueError as error:
                raise ValueError(f"{setting.title}: {error}") from error

    def recipe_of(self, setting: Setting, seed: int, folder: Path) -> TrainingRecipe:
        """Return the recipe that a setting is trained by; ``ValueError`` if it is none."""
        assert setting.changes is not None
        output = str(folder / ADAPTERS / run_name(setting, seed))
        return dataclasses.replace(self.recipe, **setting.changes, seed=seed, output=output, report_to="none")

    def runs(self) -> list[tuple[Setting, int]]:
        """List what is run: all settings with the first seed, then with the next one."""
        return [
            (setting, seed)
            for seed in self.seeds
            for setting in self.settings
            if setting.changes is not None or seed == self.seeds[0]
        ]

    def described(self) -> dict[str, Any]:
        """Say all that the results depend on but the machine, as JSON takes it."""
        recipe = dataclasses.asdict(self.recipe)
        # What changes nothing, and what the runs have of their own. The load is a mean over the last log entries.
        left_out = {*FREE_ON_RESUME, "seed", "save_steps"} - {"logging_steps"}
        sets = {"train": self.train, "asked": list(self.asked.values())}
        described = {
            "kind": self.kind,
            "recipe": {name: value for name, value in recipe.items() if name not in left_out},
            "base_files": base_digest(self.recipe.model, self.recipe.gguf_file),
            "settings": {setting.name: setting.changes for setting in self.settings},
            "seeds": self.seeds,
            **{name: {own.source: _digest(own) for own in own_sets} for name, own_sets in sets.items()},
        }
        return json.loads(json.dumps(described))

    def source(self) -> ModelSource:
        """Say how the model is held when it is asked."""
        device = "cuda" if torch.cuda.is_available() and not self.recipe.use_cpu else "cpu"
        return dataclasses.replace(base_source(self.recipe), device=device)


Documents = dict[tuple[str, int], dict[str, Any]]  # setting's name, seed -> result


def run_sweep(sweep: Sweep, folder: Path, say: Callable[[str], None]) -> Documents:
    """Run what is missing of a sweep in a folder, and return all of its results.

    A run that was killed goes on from its last checkpoint; one that is done is not run again. Adapters stay in the
    folder, their checkpoints do not.

    Args:
        sweep: what to run.
        folder: new, empty, or of the same sweep.
        say: takes lines for the user.

    Raises:
        ValueError: the folder holds something else or a sweep of other settings (what differs is named), another
            process is at work in it, it cannot be written to; or as `graphmoe_model.training.train`.
    """
    check_folder(sweep, folder)
    with alone(folder / LOCK, f"the sweep in {folder} is", "name another folder"):
        if not (folder / SWEEP_FILE).exists():
            write_document(sweep.described(), folder / SWEEP_FILE)
        (folder / RUNS).mkdir(exist_ok=True)
        for line in _shared(sweep):
            say(line)
        done: Documents = {}
        runs = sweep.runs()
        for i, (setting, seed) in enumerate(runs):
            file = folder / RUNS / f"{run_name(setting, seed)}.json"
            if not file.exists():
                say(
                    f"run {i + 1} of {len(runs)}: {setting.title}"
                    + ("" if setting.changes is None else f", seed {seed}")
                )
                write_document(_run(sweep, setting, seed, folder, say), file)
            document = read_document(file, "a result of the sweep; remove it, and it is run again")
            # After the result, and again where it was there: a kill may have come in between.
            _tidy(folder / ADAPTERS / run_name(setting, seed), keep=document["diverged"] is None)
            done[setting.name, seed] = document
    return done


def check_folder(sweep: Sweep, folder: Path) -> None:
    """`ValueError` for a folder that holds something else, or a sweep of other settings: both are named."""
    file = folder / SWEEP_FILE
    if not file.exists():
        strangers = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.is_dir() else []
        if strangers:
            raise ValueError(f"--out {folder} holds {strangers[0]} and no sweep; name a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written to: {error.strerror}; name another folder") from error
        return
    then, now = read_document(file, "a sweep"), sweep.described()
    if then.get("kind") != now["kind"]:
        raise ValueError(f"--out {folder} holds a sweep of graphmoe analyze {then.get('kind')}; name another folder")
    changed = differences(_without_sets(then), _without_sets(now))
    for key, verb in SETS.items():
        if then.get(key) != now[key]:
            changed.append(f"{verb} {_listed(then.get(key))}, not {_listed(now[key])}")
    if changed:
        raise ValueError(
            f"--out {folder} holds a sweep with {'; '.join(changed)}. Name another folder, or what it was begun with"
        )


def run_name(setting: Setting, seed: int) -> str:
    """Return what a run's files are called."""
    return setting.name if setting.changes is None else f"{setting.name}.seed{seed}"


def slug(text: str) -> str:
    """Write a setting's title as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def fitted_recipe(recipe: TrainingRecipe) -> TrainingRecipe:
    """Return a recipe with the preset's values and those of this machine filled in; ``ValueError`` as `fitted`."""
    return fitted(recipe.resolved(), processes=1)


def _run(sweep: Sweep, setting: Setting, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    recipe = None if setting.changes is None else sweep.recipe_of(setting, seed, folder)
    asked = {task: own.questions for task, own in sweep.asked.items()}
    questions = [question for own in sweep.train for question in own.questions]
    done = run_once(recipe, questions, sweep.source(), asked, batch_size=BATCH, say=lambda line: say(f"  {line}"))
    answered = done.answered
    return {
        "right": {} if answered is None else {task: marks(asked[task], own) for task, own in answered.chosen.items()},
        "seconds_per_question": None if answered is None else _per_question(answered.seconds, asked),
        **done.document,
    }


def _shared(sweep: Sweep) -> Iterator[str]:
    """Yield a line for each task with questions that are trained on too, and so may be known by heart."""
    trained = [question for own in sweep.train for question in own.questions]
    for task, own in sweep.asked.items():
        if shared := count_shared(own.questions, trained):
            yield (
                f"{shared:,} of {len(own.questions):,} questions of {task} are trained on too: their answers may be "
                "known by heart; ask others by --test-data"
            )


def _tidy(adapter: Path, keep: bool) -> None:
    """Remove what a finished run does not need: its checkpoints, and all of one that diverged, if it is there."""
    if not keep and adapter.exists():
        shutil.rmtree(adapter)
    for checkpoint in checkpoints(adapter):
        remove(checkpoint)


def _per_question(seconds: Mapping[str, float], asked: Mapping[str, Sequence[Any]]) -> float:
    return round(math.fsum(seconds.values()) / sum(map(len, asked.values())), 6)


def _without_sets(described: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key not in SETS}


def _listed(sets: Any) -> str:
    """Questions by source, number and the beginning of their digest, in a sentence."""
    return " and ".join(f"{source} ({told})" for source, told in dict(sets or {}).items())


def _digest(found: QuestionSet) -> str:
    """Tell a set by its questions: a file may change under its name."""
    return f"{len(found):,} questions, {questions_digest(found.questions)[:12]}"
