"""What the study is made of: methods, rates, parts, and the run of one method at one rate with one seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from graphmoe_model.questions import Question
from graphmoe_tables.recipe import TrainingRecipe

VALIDATION, TEST = "validation", "test"


class Base(NamedTuple):
    """A base model: a folder, and the GGUF file in it that holds the weights, if they are in one."""

    folder: str
    gguf_file: str | None = None


class Material(Protocol):
    """What a part trains on and asks."""

    def settings(self) -> dict[str, Any]:
        """Return all that base models and questions depend on, as JSON takes it."""

    def base(self, seed: int, work: Path) -> Base:
        """Return the base model for a seed, which is made in the folder ``work`` if it has to be."""

    def questions(self, task: str, split: str, seed: int) -> Sequence[Question]:
        """Return a split of a task: ``train``, ``validation`` or ``test``."""

    def group(self, question: Question) -> str:
        """Return which of the groups that accuracy is told for a question belongs to."""


@dataclass(frozen=True)
class Rate:
    """A learning rate of the grid.

    Attributes:
        learning_rate: of everything but the GRUs.
        gru_factor: the GRUs' rate over that one; None where there is no GRU.
    """

    learning_rate: float
    gru_factor: float | None = None

    @property
    def name(self) -> str:
        """As file names have it."""
        return f"lr{self.learning_rate:g}" + ("" if self.gru_factor is None else f"-gru{self.gru_factor:g}")

    @property
    def title(self) -> str:
        """As tables have it."""
        return f"{self.learning_rate:g}" + ("" if self.gru_factor is None else f", GRU x {self.gru_factor:g}")


@dataclass(frozen=True)
class Method:
    """A method of the study.

    Attributes:
        name: in file names and on the command line.
        title: in tables.
        preset: the papers' settings that it starts from; None: the base model as it is, which is not trained.
        adapter: the fields of a recipe that differ from the preset's.
        rates: the grid; as many for each method that is trained.
        step_seconds: a training step's seconds, for the estimate before there are results.
    """

    name: str
    title: str
    preset: str | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[Rate, ...] = ()
    step_seconds: float = 0.0

    @property
    def trained(self) -> bool:
        """Whether it is more than the base model."""
        return self.preset is not None


@dataclass(frozen=True)
class Part:
    """One part of the study: real questions, easy or hard, or questions of graded depth.

    Attributes:
        name: of the folder of its results.
        title: the heading of its tables.
        tasks: what is trained and tested on, each by itself.
        methods: what is compared.
        references: the methods that each other one's difference is told from.
        seeds: at least one.
        rate_seeds: how many of them, from the first on, run at every rate of the grids and choose among those.
        recipe: the fields of a recipe that are the same for all methods; ``max_steps`` and ``batch`` among them.
        material: base models and questions.
        base_per_seed: whether the base model differs with the seed.
        evaluation_steps: what it takes to ask a split, in steps of training, for the estimate before there are results.
        start_seconds: of what a run does besides, such as loading its model, for the same.

    Raises:
        ValueError: grids of unequal size, two methods of one name, a reference that is no method, no seeds, or fewer
            than are to choose the rates.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    methods: tuple[Method, ...]
    references: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: Mapping[str, Any]
    material: Material
    rate_seeds: int = 1
    base_per_seed: bool = False
    evaluation_steps: float = 0.0
    start_seconds: float = 0.0

    def __post_init__(self) -> None:
        sizes = {method.name: len(method.rates) for method in self.methods if method.trained}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ValueError(f"every trained method of {self.name} needs a grid of the same size, got {sizes}")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"two methods of {self.name} have one name: {names}")
        if not set(self.references) <= set(names):
            raise ValueError(f"{self.name} compares with {self.references}, and has the methods {names}")
        if not self.seeds or not self.tasks:
            raise ValueError(f"{self.name} needs at least one seed and one task")
        if not 1 <= self.rate_seeds <= len(self.seeds):
            raise ValueError(f"{self.name} chooses rates with 1 to {len(self.seeds)} seeds, got {self.rate_seeds}")

    @property
    def choosing(self) -> tuple[int, ...]:
        """The seeds that choose the rates."""
        return self.seeds[: self.rate_seeds]

    @property
    def bf16(self) -> bool:
        """Whether models are trained and asked in bf16."""
        return bool(self.recipe.get("bf16"))

    def method(self, name: str) -> Method:
        """Return the method of a name; ``KeyError`` if there is none."""
        return {method.name: method for method in self.methods}[name]

    def seeds_of(self, method: Method) -> tuple[int, ...]:
        """Return the seeds that a method is run with: a base model that is always the same is run once."""
        return self.seeds if method.trained or self.base_per_seed else self.seeds[:1]


@dataclass(frozen=True)
class Run:
    """One method on one task, at one rate, with one seed."""

    part: Part
    task: str
    method: Method
    rate: Rate | None
    seed: int

    @property
    def name(self) -> str:
        """Of its files, without an ending."""
        parts = [self.task, self.method.name, *([] if self.rate is None else [self.rate.name]), f"seed{self.seed}"]
        return ".".join(parts)

    @property
    def splits(self) -> tuple[str, ...]:
        """What is asked after training: validation, which chooses the rate, with the seeds that choose it alone."""
        return (VALIDATION, TEST) if self.seed in self.part.choosing else (TEST,)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on but the machine, as JSON takes it."""
        method = self.method
        settings = {
            "part": self.part.name,
            "task": self.task,
            "method": method.name,
            "preset": method.preset,
            "adapter": dict(method.adapter),
            "learning_rate": None if self.rate is None else self.rate.learning_rate,
            "gru_factor": None if self.rate is None else self.rate.gru_factor,
            "seed": self.seed,
            "splits": self.splits,
            "bf16": self.part.bf16,
            "recipe": dict(self.part.recipe) if method.trained else {},
            "material": self.part.material.settings(),
        }
        return json.loads(json.dumps(settings))

    @property
    def digest(self) -> str:
        """SHA-256 of the settings."""
        return digest_of(self.settings)

    @property
    def steps(self) -> int:
        """Of its training."""
        return self.part.recipe["max_steps"] if self.method.trained else 0

    def recipe_in(self, folder: Path, base: Base) -> TrainingRecipe:
        """Return the recipe that `graphmoe train` would run in a folder."""
        assert self.rate is not None
        factor = self.rate.gru_factor
        return TrainingRecipe(
            model=base.folder,
            gguf_file=base.gguf_file,
            data=(self.task,),
            preset=self.method.preset,
            learning_rate=self.rate.learning_rate,
            seed=self.seed,
            output=str(folder),
            report_to="none",
            gru_learning_rate=None if factor is None else self.rate.learning_rate * factor,
            **self.method.adapter,
            **self.part.recipe,
        )


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
