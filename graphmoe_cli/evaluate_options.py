"""What ``graphmoe eval`` was asked for, and whether that can be done."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graphmoe_tables.data_names import data_named
from graphmoe_tables.tasks import EVALUATION


@dataclass(frozen=True)
class EvaluateOptions:
    """The command's options; `graphmoe_cli.evaluate` says what each means.

    Raises:
        ValueError: options that exclude each other, that need one another, or out of range; questions that
            there are not; a file that cannot be written; lm-eval is not installed.
    """

    model: str
    adapter: str | None = None
    allow_other_base: bool = False
    data: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    split: str = EVALUATION
    shots: int = 0
    examples: str | None = None
    samples: int | None = None
    temperature: float | None = None
    batch_size: int = 8
    limit: int | None = None
    max_length: int | None = None
    seed: int = 0
    gguf_file: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    dtype: str = "auto"
    device: str = "auto"
    output: Path = Path("evaluation.json")
    records: Path | None = None

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError("--model is empty; name the base model: a folder, or a name on the hub")
        self._check_data()
        self._check_numbers()
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load-in-4bit and --load-in-8bit exclude each other")
        if self.allow_other_base and self.adapter is None:
            raise ValueError("--allow-other-base is about an --adapter, and none was given")
        for option, path in (("--output", self.output), ("--records", self.records)):
            if path is not None:
                check_file(option, path)
        if self.records is not None and self.records.resolve() == self.output.resolve():
            raise ValueError(f"--output and --records are both {self.output}; name two files")
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("evaluation needs lm-eval: pip install 'graphmoe[eval]'")
        for name in self.data:
            data_named(name, self.split)
        if self.examples is not None:
            data_named(self.examples, "train")

    def _check_data(self) -> None:
        if not self.data and not self.tasks:
            raise ValueError(
                "name what to evaluate on: --data with tasks or .jsonl files, or --tasks with lm-eval's tasks"
            )
        check_names("--data", self.data)
        check_names("--tasks", self.tasks)
        if not self.data:
            for option, given in (
                ("--samples", self.samples),
                ("--examples", self.examples),
                ("--records", self.records),
                ("--split", None if self.split == EVALUATION else self.split),
            ):
                if given is not None:
                    raise ValueError(f"{option} is about --data; lm-eval's --tasks are run as lm-eval defines them")

    def _check_numbers(self) -> None:
        for option, value, least in (
            ("--shots", self.shots, 0),
            ("--samples", self.samples, 1),
            ("--batch-size", self.batch_size, 1),
            ("--limit", self.limit, 1),
            ("--max-length", self.max_length, 16),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{option} must be at least {least}, got {value}")
        if self.temperature is not None:
            if self.samples is None:
                raise ValueError("--temperature is that of sampled answers; say how many by --samples")
            if not 0 < self.temperature < math.inf:
                raise ValueError(f"--temperature must be above 0, got {self.temperature}")
        if self.examples is not None and self.shots == 0:
            raise ValueError("--examples is where solved examples come from; say how many by --shots")


def check_names(option: str, names: Sequence[str]) -> None:
    """`ValueError` that names the option, for a name that is empty or there twice."""
    for name in names:
        if not name.strip():
            raise ValueError(f"{option} has an empty name")
        if names.count(name) > 1:
            raise ValueError(f"{option} names {name} twice")


def check_file(option: str, path: Path) -> None:
    """Refuse, before hours are spent, a file that cannot be written: ``ValueError`` that names the option."""
    if not str(path) or path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}; make it, or name another file")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{option} {path} cannot be written; name another file")
