"""Where the time of a small whole model goes: attention, MLP, experts, routing and GRU (the paper's Fig 6)."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case
from benchmarks.devices import Device
from benchmarks.generation import make_model, with_adapter
from benchmarks.operators import DTYPES
from graphmoe_model.profiling import profile_model

# What the profile calls an adapter, by provider and T.
TITLES = {("dense", 1): "none", ("peft_lora", 1): "LoRA", ("ours", 1): "MixLoRA (T=1)", ("ours", 3): "GraphMoE (T=3)"}
REPETITIONS = 3
# What every forward has: a share of nothing would mislead.
ALWAYS = ("attention", "mlp")


def profiles(case: Case, device: Device) -> list[dict[str, Any]]:
    """Seconds by part for every contender, prefill and decode, at the lengths of the case.

    Raises:
        AssertionError: a part that every forward has took no time at all.
    """
    dtype = DTYPES[case.contenders[0].sizes.dtype]
    base = make_model(case.model, case.layers, dtype, device.torch)
    found = []
    for contender in case.contenders:
        name, rounds = contender.provider, contender.sizes.rounds
        title = TITLES.get((name, rounds)) or TITLES["ours", rounds]
        adapted = with_adapter(base, name, contender.sizes)
        made = profile_model(adapted, title, lengths=case.lengths, name=case.model.name, repetitions=REPETITIONS)
        found += [profile.as_dict() for profile in made]
    for each in found:
        if missing := [part for part in ALWAYS if not each["seconds"][part] > 0]:
            raise AssertionError(f"{each['adapter']}, {each['phase']}: {', '.join(missing)} took no time")
    return found
