"""What ``graphmoe analyze`` was asked for, and whether that can be done."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphmoe_cli.evaluate_options import check_names
from graphmoe_cli.pictures import drawn
from graphmoe_cli.results_folder import check_folder
from graphmoe_tables.data_names import data_named
from graphmoe_tables.recipe import TrainingRecipe
from graphmoe_tables.tasks import EVALUATION


def check_files(files: Sequence[Path], out: Path, plot: bool | None) -> None:
    """`ValueError` for a file that is not there or named twice, a folder that is a file, or pictures that cannot be."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no file {file}; name a profile.json, or a result of pytest benchmarks")
        if files.count(file) > 1:
            raise ValueError(f"{file} is named twice")
    check_folder(out)
    drawn(plot)


@dataclass(frozen=True)
class ModelOptions:
    """A base model with saved adapters, and how it reads: what analyses of a trained adapter share.

    Raises:
        ValueError: a name that is empty or there twice, no adapter, a number out of range, a folder that is a file.
    """

    model: str
    adapter: tuple[str, ...]
    gguf_file: str | None = None
    allow_other_base: bool = False
    batch_size: int = 8
    max_length: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    out: Path = Path("analysis")
    plot: bool | None = None

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError("--model is empty; name the base model: a folder, or a name on the hub")
        if not self.adapter:
            raise ValueError("name what to analyze by --adapter: folders of saved adapters, or names on the hub")
        check_names("--adapter", self.adapter)
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.max_length is not None and self.max_length < 16:
            raise ValueError(f"--max-length must be at least 16, got {self.max_length}")
        check_folder(self.out)
        drawn(self.plot)


@dataclass(frozen=True)
class DataOptions:
    """Questions of which the prompts are read.

    Raises:
        ValueError: a name that is empty, there twice or of no questions, or a limit below 1.
    """

    data: tuple[str, ...] = ()
    split: str = EVALUATION
    limit: int | None = None

    def __post_init__(self) -> None:
        check_names("--data", self.data)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {self.limit}")
        for name in self.data:
            data_named(name, self.split)


@dataclass(frozen=True)
class TraceOptions:
    """What is traced, and what of it is drawn.

    Raises:
        ValueError: neither texts nor questions, an empty text, or a number out of range.
    """

    text: tuple[str, ...] = ()
    data: DataOptions = DataOptions()
    router: tuple[str, ...] = ()
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.text and not self.data.data:
            raise ValueError("name what to trace: --text with texts, or --data with tasks or .jsonl files")
        if not all(text.strip() for text in self.text):
            raise ValueError("--text is empty; give a text of at least a word")
        check_names("--router", self.router)
        if self.draws < 1 or self.seed < 0:
            raise ValueError(f"--draws must be at least 1 and --seed at least 0, got {self.draws} and {self.seed}")


@dataclass(frozen=True)
class SweepOptions:
    """A recipe, what is changed in it, and what the adapters are asked.

    Raises:
        ValueError: a recipe with questions that choose a checkpoint, a number out of range, a folder that is a file,
            lm-eval is not installed.
    """

    kind: str
    recipe: TrainingRecipe
    grid: Mapping[str, Sequence[float]]
    test_data: tuple[str, ...] = ()
    limit: int | None = None
    seeds: tuple[int, ...] = ()  # none: the recipe's own
    out: Path = Path("sweep")
    plot: bool | None = None

    def __post_init__(self) -> None:
        if self.recipe.eval_data is not None:
            raise ValueError(
                "a sweep compares adapters after the same steps, and the recipe has eval_data, which would choose a "
                "checkpoint; leave it out"
            )
        if self.recipe.fsdp or self.recipe.deepspeed:
            raise ValueError("a sweep runs in one process; leave fsdp and deepspeed out of the recipe")
        for name in self.recipe.data:
            data_named(name, "train")
        DataOptions(self.test_data or self.recipe.data, limit=self.limit)
        for option, values in self.grid.items():
            name = f"--{option.replace('_', '-')}"
            for value in values:
                if not (0 < value < math.inf):
                    raise ValueError(f"{name} must be numbers above 0, got {value:g}")
        check_folder(self.out)
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("asking adapters needs lm-eval: pip install 'graphmoe[eval]'")
        drawn(self.plot)
