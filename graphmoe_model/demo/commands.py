"""What to type after the demo: to ask its adapter again, and to do the same on a real model."""

from __future__ import annotations

import shlex
from pathlib import Path

from graphmoe_model.demo.scale import BASE, QUESTIONS, TRAINED
from graphmoe_tables.tasks import MODELS, data_folder

TASK, MODEL = "headlines", "smollm2"
# A hundred short steps in place of the recipe's two epochs of long ones: minutes on a CPU, as the README's figures are.
BRIEF = "--bf16 --max-steps 100 --accumulation 1 --warmup 0.1 --gru-learning-rate 6e-5"


def evaluation_command(folder: Path) -> str:
    """Return the command that asks the demo's adapter its held-out questions again."""
    base, adapter = (shlex.quote(str(folder / name)) for name in (BASE, TRAINED))
    held_out = f"{shlex.quote(str(folder / QUESTIONS / 'held_out'))}/*.jsonl"
    return f"graphmoe eval --model {base} --adapter {adapter} --data {held_out}"


def real_commands() -> list[str]:
    """Return the commands that fetch a real model and questions, train on them, and ask."""
    model = f"--model {shlex.quote(str(data_folder() / MODEL))} --gguf-file {MODELS[MODEL].file}"
    return [
        f"graphmoe data fetch {TASK} {MODEL}",
        f"graphmoe train {model} --data {TASK} --output tuned {BRIEF}",
        f"graphmoe eval {model} --data {TASK} --adapter tuned --dtype bfloat16 --output tuned.json",
    ]


def on_a_real_model() -> str:
    """Return the sentence that the demo ends with."""
    fetch, train, evaluate = (f"`{command}`" for command in real_commands())
    return (
        f"The same on a real model, after `pip install 'graphmoe[train,eval,gguf]'`: {fetch} brings it with real "
        f"questions, {train} trains as this demo did, and {evaluate} asks."
    )
