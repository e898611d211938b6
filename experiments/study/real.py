"""SmolLM2-135M on questions that people wrote, all of it from the package index: a part each for easy and hard ones.

Headlines are learnt in the steps that there are, so all methods are compared on them with all seeds. Of Social IQA and
QuaRTz nothing was learnt in trials: their part asks with one seed whether it can be, and compares nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.study.results import StudyError
from experiments.study.settings import Base, Method, Part, Rate
from graphmoe_model.questions import Question, load_questions
from graphmoe_tables.tasks import data_folder

TASKS, HARD_TASKS = ("headlines",), ("social_iqa_small", "quartz")
MODEL, GGUF_FILE = "smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Ranks with as many parameters as MixLoRA of rank 8 with its 4 experts; MATCHED_RANK: as GraphMoE with its GRUs.
RANK, MATCHED_RANK, LORA_RANK, LORAMOE_RANK = 8, 13, 23, 9
# Made longer, for all methods, as long as the best of one was at an end.
RATES, HARD_RATES, GRU_FACTOR = (2e-4, 4e-4, 8e-4, 16e-4, 32e-4, 1e-4, 64e-4), (2e-4, 8e-4, 32e-4), 0.3


class RealMaterial:
    """The tasks and the model that `graphmoe data fetch` brings."""

    def settings(self) -> dict[str, Any]:
        """Return the model's file; the tasks are named by the runs, and pinned by their sizes and digests."""
        return {"model": MODEL, "gguf_file": GGUF_FILE}

    def base(self, seed: int, work: Path) -> Base:
        """Return the fetched model.

        Raises:
            StudyError: it was not fetched.
        """
        del seed, work
        folder = data_folder() / MODEL
        if not (folder / GGUF_FILE).is_file():
            raise StudyError(
                f"there is no {folder / GGUF_FILE}: run graphmoe data fetch "
                f"{' '.join(TASKS + HARD_TASKS)} smollm2, or set GRAPHMOE_DATA to where they are"
            )
        return Base(str(folder), GGUF_FILE)

    def questions(self, task: str, split: str, seed: int) -> Sequence[Question]:
        """Return a split of a task."""
        del seed
        return load_questions(task, split).questions

    def group(self, question: Question) -> str:
        """Return the one group that there is."""
        del question
        return "all"


def _method(name: str, title: str, preset: str, rank: int, rounds: int, step_seconds: float) -> Method:
    adapter: dict[str, Any] = {"rounds": rounds, "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05}
    if preset != "lora":
        adapter["num_experts"] = "4"
    if preset.endswith("mixlora"):
        adapter["top_k"] = 2
    if rounds > 1:
        adapter["gru_hidden_scale"] = 0.1
    return Method(name, title, preset, adapter, _grid(RATES, rounds), step_seconds)


def _grid(rates: Sequence[float], rounds: int) -> tuple[Rate, ...]:
    return tuple(Rate(rate, GRU_FACTOR if rounds > 1 else None) for rate in rates)


METHODS = (
    Method("untouched", "the base model", step_seconds=1.0),
    _method("lora", "LoRA", "lora", LORA_RANK, 1, 1.9),
    _method("mixlora", "MixLoRA", "mixlora", RANK, 1, 2.2),
    _method("mixlora-matched", "MixLoRA with the GRUs' parameters in rank", "mixlora", MATCHED_RANK, 1, 2.3),
    _method("graphmoe-t2", "GraphMoE(MixLoRA), T = 2", "graphmoe-mixlora", RANK, 2, 3.7),
    _method("graphmoe-t3", "GraphMoE(MixLoRA), T = 3", "graphmoe-mixlora", RANK, 3, 5.2),
    _method("loramoe", "LoRAMoE", "loramoe", LORAMOE_RANK, 1, 2.4),
    _method("graphmoe-loramoe-t3", "GraphMoE(LoRAMoE), T = 3", "graphmoe-loramoe", LORAMOE_RANK, 3, 5.5),
)
PART = Part(
    name="real",
    title="Real questions",
    tasks=TASKS,
    methods=METHODS,
    references=("lora", "mixlora", "mixlora-matched"),
    seeds=(0, 1, 2),
    recipe={
        **{"batch": 16, "accumulation": 1, "max_steps": 96, "scheduler": "linear", "warmup": 0.1},
        **{"max_length": 192, "logging_steps": 8, "save_steps": 32, "keep_checkpoints": 1},
        "bf16": True,
    },
    material=RealMaterial(),
    evaluation_steps=15,
    start_seconds=40,
)
HARD = replace(
    PART,
    name="hard",
    title="Harder real questions",
    tasks=HARD_TASKS,
    methods=tuple(
        replace(method, rates=_grid(HARD_RATES, method.adapter["rounds"])) if method.trained else method
        for method in METHODS
        if method.name in ("untouched", "lora", "graphmoe-t3")
    ),
    references=("untouched",),
    seeds=(0,),
)
