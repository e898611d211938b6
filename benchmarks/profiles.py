"""Where the time of a small whole model goes: attention, MLP, experts, routing and GRU (the paper's Fig 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cases import Plan
from benchmarks.devices import Device
from benchmarks.generation import make_model, with_adapter
from benchmarks.layers import DTYPES
from benchmarks.sizes import Model
from graphmoe_model.profiling import profile_model

# provider, T -> what the profile calls it
ADAPTERS = (
    ("dense", 1, "none"),
    ("peft_lora", 1, "LoRA"),
    ("ours", 1, "MixLoRA (T=1)"),
    ("ours", 3, "GraphMoE (T=3)"),
)
REPETITIONS = 3


def profiles(model: Model, device: Device, dtype: str, plan: Plan, providers: Sequence[str]) -> list[dict[str, Any]]:
    """Seconds by part for every adapter of ``providers``, prefill and decode, at the lengths of the plan."""
    base = make_model(model, plan.whole_layers, DTYPES[dtype], device.torch)
    ours = "triton" if device.kind == "cuda" else "torch"
    found = []
    for provider, rounds, title in ADAPTERS:
        name = ours if provider == "ours" else provider
        if name not in providers:
            continue
        adapted = with_adapter(base, name, model.sizes(1, rounds, dtype))
        profiled = profile_model(adapted, title, lengths=plan.profiled, name=model.name, repetitions=REPETITIONS)
        found += [profile.as_dict() for profile in profiled]
    return found
