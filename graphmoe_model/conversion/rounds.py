"""From a base method to GraphMoE on it: a fresh GRU for every MLP of a saved adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from graphmoe_model.conversion.adapter import Adapter
from graphmoe_model.conversion.layout import CONTAINER
from graphmoe_model.layers.gru import RethinkingGRU
from graphmoe_model.module_names import ROOT

GRU_SETTINGS = ("gru_hidden_scale", "candidate_input", "candidate_activation", "fold")


def with_rounds(adapter: Adapter, rounds: int, seed: int = 0, **gru: Any) -> Adapter:
    """Add self-rethinking in ``rounds`` rounds to an adapter: the same tensors, and GRUs drawn as for a new one.

    W_g is zero, so the model's output is as before until the GRUs are trained.

    Args:
        adapter: of any method, with one round.
        rounds: T, at least 2.
        seed: of the GRUs' values; PyTorch's own generator is left alone.
        gru: fields of the configuration: ``gru_hidden_scale``, ``candidate_input``, ``candidate_activation``, ``fold``.

    Raises:
        ValueError: the adapter has a GRU already, ``rounds`` is below 2, or a setting is not the GRU's or out of range.
    """
    config = adapter.config
    if config.rounds > 1:
        raise ValueError(
            f"this adapter has {config.rounds} rounds, and GRUs trained for them: rounds are added to an adapter with "
            "one, not changed or taken away; leave rounds out, or start from the adapter of one round it came from"
        )
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 2:
        raise ValueError(f"rounds must be an integer of at least 2 (one round has no GRU), got {rounds!r}")
    unknown = [name for name in gru if name not in GRU_SETTINGS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no setting of the GRU; there are {', '.join(GRU_SETTINGS)}")
    config = dataclasses.replace(config, rounds=rounds, **gru)
    tensors = dict(adapter.tensors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in adapter.modules:
            if module.is_mlp:
                place = f"{ROOT}{module.path}.{CONTAINER}"
                like = tensors[f"{place}.experts.gate_proj.A"]  # [n, r, D]
                fresh = RethinkingGRU(like.shape[-1], config.gru_width(like.shape[-1])).state_dict()
                tensors |= {f"{place}.gru.{name}": value.to(like.dtype) for name, value in fresh.items()}
    return Adapter(config, tensors, adapter.notes)
