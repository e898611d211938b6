"""Reading the decoder layers of a checkpoint of another format: what must be there, and where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphmoe_model.config import GraphMoEConfig, rank_and_alpha
from graphmoe_model.conversion.layout import LINEARS, Shape, check_tensors, resolved
from graphmoe_model.conversion.modules import Module
from graphmoe_model.module_names import ROOT

# Names of one and the same linear in different models: a target that a model does not have is passed over, by the peers
# as here, which must not hide one that is missing.
_QKV = ("q_proj", "k_proj", "v_proj")
_OTHER_MLPS = ("gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")
_ELSEWHERE = {
    **{name: {"qkv_proj"} for name in _QKV},
    **{name: set(LINEARS) for name in _OTHER_MLPS},
    "qkv_proj": set(_QKV),
    "o_proj": {"dense"},
    "dense": {"o_proj"},
}


class Layers(NamedTuple):
    """Where a checkpoint keeps what.

    Attributes:
        theirs, ours: what stands before a layer's number in a tensor's name, there and here.
        numbers: of the layers.
        mlp: the MLP's name in a layer.
        linears: which linears of it are adapted.
        projections: names of adapted attention projections in a layer.
        alike: whether all layers have the same sizes.
    """

    theirs: str
    ours: str
    numbers: Sequence[int]
    mlp: str
    linears: Sequence[str]
    projections: Sequence[str]
    alike: bool


def wanted(targets: Any, found: set[str]) -> tuple[set[str], list[str]]:
    """Choose from a config's list the linears that must be there, with a note on those the model seems not to have."""
    if isinstance(targets, dict):
        targets = [name for name, chosen in targets.items() if chosen]
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"target_modules must be a list of names, got {targets!r}")
    missing = sorted(name for name in targets if name not in found and _ELSEWHERE.get(name, set()) & found)
    notes = [f"target_modules has {', '.join(missing)}, which this model does not have: left out"] if missing else []
    return set(targets) - set(missing), notes


def check_linears(linears: set[str], what: str) -> None:
    """Refuse MLPs that are not of gate_proj, up_proj and down_proj."""
    others = sorted(linears - set(LINEARS))
    if others:
        raise ValueError(
            f"{what} adapts {', '.join(others)} in the MLPs; only MLPs of {', '.join(LINEARS)} can be converted"
        )


def not_adapted(linears: Sequence[str], config: GraphMoEConfig) -> list[str]:
    """Make a note on the linears that the checkpoint leaves out."""
    absent = [linear for linear in LINEARS if linear not in linears]
    if not absent:
        return []
    what = "A, B and router" if config.base_method.routers == "linear" else "A and B"
    return [f"the checkpoint does not adapt {', '.join(absent)}: {what} are zeros there, and stay so in training"]


def read_layers(
    weights: Mapping[str, Tensor], config: GraphMoEConfig, layers: Layers, what: str, problems: list[str]
) -> dict[str, Tensor]:
    """Read the tensors of all layers, by their names here and experts stacked.

    Raises:
        ValueError: as `check_tensors`.
    """
    expected: dict[str, Shape] = {}
    here: list[tuple[str, Shape, list[str], bool]] = []
    for number in layers.numbers:
        for place in (layers.mlp, *layers.projections):
            path = f"{layers.ours.removeprefix(ROOT)}.{number}.{place}"
            letters = letters_at(config, path, place if layers.alike else path)
            for name, entry in Module.at(path, place == layers.mlp).entries(config):
                shape = resolved(entry.shape, letters)
                assert isinstance(config.num_experts, int)
                names = [f"{layers.theirs}.{number}.{place}.{peer}" for peer in entry.peers(config.num_experts)]
                names = names if entry.linear in ("", *layers.linears) else []
                expected |= dict.fromkeys(names, shape[1:] if entry.stacked else shape)
                here.append((name, shape, names, entry.stacked))
    sizes = check_tensors(weights, expected, what, problems)
    tensors = {}
    for name, shape, names, stacked in here:
        if not names:
            tensors[name] = torch.zeros([sizes[size] if isinstance(size, str) else size for size in shape])
        else:
            tensors[name] = torch.stack([weights[n] for n in names]) if stacked else weights[names[0]]
    return tensors


def letters_at(config: GraphMoEConfig, path: str, scope: str) -> dict[str, int | str]:
    """Say what the letters of a module's shapes stand for: known sizes, or letters of its own."""
    known: dict[str, int | str] = {"r": rank_and_alpha(config, path)[0], "n": config.num_experts}  # type: ignore[dict-item]
    return known | {letter: f"{scope}.{letter}" for letter in ("F", "in", "out")}


def without_gaps(found: set[int]) -> tuple[list[int], list[str]]:
    """Sort the layers' numbers, and name the gaps between them as problems."""
    numbers = sorted(found)
    gaps = [(a + 1, b - 1) for a, b in pairwise([-1, *numbers]) if b - a > 1]
    text = [f"layer {a}" if a == b else f"layers {a} to {b}" for a, b in gaps]
    return numbers, [f"{layers}: all tensors missing" for layers in text]
