"""The formats that adapters are converted to."""

from __future__ import annotations

FORMATS = {
    "graphmoe": "an adapter of this package",
    "peft": "PEFT's own LoRA (of the method lora with one round), which PEFT merges",
    "moe-peft": "one that MoE-PEFT reads",
    "attention-lora": "PEFT's LoRA adapter of the attention projections alone",
}


def check_format(name: str, rounds: int | None) -> None:
    """Raise ``ValueError`` for an unknown format, and for rounds where the format has no GRU to add."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are {', '.join(FORMATS)}")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if rounds is not None and name != "graphmoe":
        raise ValueError(f"rounds={rounds} goes with the format 'graphmoe' alone: {name!r} has no GRU to add")
