"""A part of the study that runs in seconds: a tiny base model, made-up questions, three methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.study.settings import Base, Method, Part, Rate, Run
from graphmoe_model.questions import Question
from tests.model.training_runs import make_base, make_questions

SMALL: dict[str, Any] = {"r": 2, "lora_alpha": 4, "num_experts": "4", "top_k": 2}
PLAIN, WITH_GRU = (Rate(0.01), Rate(0.02)), (Rate(0.01, 0.1), Rate(0.01, 0.3))
COUNTS = {"train": (16, 0), "validation": (6, 1), "test": (9, 2)}


class MadeUp:
    """The same base model for each seed, and a third of the questions in a group of their own."""

    def settings(self) -> dict[str, Any]:
        return {"made": "up"}

    def base(self, seed: int, work: Path) -> Base:
        folder = work / "base"
        if not folder.exists():
            make_base(folder)
        return Base(str(folder))

    def questions(self, task: str, split: str, seed: int) -> Sequence[Question]:
        count, own = COUNTS[split]
        return make_questions(count, own + len(task))

    def group(self, question: Question) -> str:
        return "first" if question.answer == 0 else "others"


def part(steps: int = 4, **changes: Any) -> Part:
    """Return the part; ``changes`` are to its fields."""
    recipe = {"batch": 4, "accumulation": 1, "max_steps": steps, "max_length": 32, "save_steps": 2, "logging_steps": 1}
    fields = {
        "name": "made_up",
        "title": "Made up",
        "tasks": ("one", "three"),
        "methods": (
            Method("untouched", "the base model", step_seconds=0.5),
            Method("mixlora", "MixLoRA", "mixlora", {**SMALL, "rounds": 1}, PLAIN, 1.0),
            Method(
                "graphmoe",
                "GraphMoE",
                "graphmoe-mixlora",
                {**SMALL, "rounds": 2, "gru_hidden_scale": 0.25},
                WITH_GRU,
                2.0,
            ),
        ),
        "references": ("mixlora",),
        "seeds": (3, 4),
        "recipe": {**recipe, "use_cpu": True},
        "material": MadeUp(),
        "evaluation_steps": 1.0,
        "start_seconds": 7.0,
    }
    return Part(**{**fields, **changes})


def small(**changes: Any) -> Part:
    """One task, two seeds, three methods: 2 x 3 + 1 runs."""
    return part(tasks=("one",), **changes)


def document(run: Run, validation: str = "110000", test: str = "101010101", **changes: Any) -> dict[str, Any]:
    """Return what a run could have found."""
    found = {"validation": {"first": validation[:2], "others": validation[2:]}} if len(run.splits) > 1 else {}
    return {
        "diverged": None,
        "right": {**found, "test": {"first": test[:3], "others": test[3:]}},
        "load_variation": [0.5] * run.method.adapter["rounds"] if run.method.trained else None,
        "seconds": {"per_step": 2.0 if run.method.trained else None, "asking": 3.0, "whole": 11.0},
        "peak_memory": None,
        "trainable_parameters": 1234 if run.method.trained else 0,
        "adapter_bytes": 10,
        "loss": None,
        "conditions": {
            "device": "cpu (made up)",
            "threads": 1,
            "dtype": "float32",
            "commit": "abc",
            "versions": {"torch": "2.0"},
        },
        **changes,
    }
