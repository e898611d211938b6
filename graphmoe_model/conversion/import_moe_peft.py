"""Adapters as MoE-PEFT and PEFT save them, read as GraphMoE adapters of one round."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from graphmoe_model.checkpoints import read_config
from graphmoe_model.conversion.adapter import Adapter, check_adapter
from graphmoe_model.conversion.files import read_weights
from graphmoe_model.conversion.import_lora import from_lora
from graphmoe_model.conversion.layout import LINEARS
from graphmoe_model.conversion.loadable import check_values
from graphmoe_model.conversion.peer_config import MOE_TYPES, PEER_TYPES, moe_config
from graphmoe_model.conversion.peer_layers import Layers, check_linears, not_adapted, read_layers, wanted, without_gaps
from graphmoe_model.messages import some
from graphmoe_model.module_names import ROOT


def from_moe_peft(folder: str | Path) -> Adapter:
    """Read a MoE-PEFT or MixLoRA adapter (MIXLORA, LORAMOE, MOLA, LORA), or PEFT's LoRA, as one of one round here.

    Every tensor keeps its values and its dtype. A linear of the MLP that the checkpoint leaves out gets zeros for A, B
    and its router: it is not adapted, in training neither, as then both gradients are zero. The returned notes say so,
    and what else is not as it was.

    Raises:
        FileNotFoundError: the folder or one of its two files is not there.
        ValueError: what the adapter computes has no equal here (all reasons are named), a file is damaged, or tensors
            are missing, have no place, have another shape (all are named) or hold NaN or infinite values.
    """
    settings = read_config(folder)
    peft_type = settings.get("peft_type")
    if peft_type not in PEER_TYPES:
        raise ValueError(
            f"{folder} holds an adapter of peft_type {peft_type!r}; what can be read is {', '.join(PEER_TYPES)}"
        )
    weights = read_weights(folder).tensors
    check_values(weights, str(folder))
    read = _from_moe if peft_type in MOE_TYPES else from_lora
    adapter = read(settings, weights, str(folder))
    check_adapter(adapter, str(folder))
    return adapter


def _from_moe(settings: dict[str, Any], weights: dict[str, Tensor], what: str) -> Adapter:
    stem = f"{settings['peft_type'].lower()}.layers"
    pattern = re.compile(rf"{stem}\.(\d+)\.(self_attn|mlp)\.(.+?)\.(?:experts\.\d+\.|lora_|moe_gate\.)")
    found = [match.groups() for match in map(pattern.match, weights) if match]
    if not found:
        called = some(list(weights), 3) or "nothing: there are none"
        raise ValueError(f"{what}: no tensor's name begins with {stem}.<number>; they are called {called}")
    attention = {linear for _, place, linear in found if place == "self_attn"}
    mlp = {linear for _, place, linear in found if place == "mlp"}
    targets, notes = wanted(settings.get("target_modules"), attention | mlp)
    check_linears(mlp, what)
    projections = sorted(target for target in targets if target not in LINEARS)
    config, more = moe_config(settings, projections, what)
    linears = [linear for linear in LINEARS if linear in targets]
    if not linears:
        raise ValueError(f"{what} adapts no linear of the MLPs ({', '.join(LINEARS)}), so it has no experts to convert")
    numbers, problems = without_gaps({int(number) for number, _, _ in found})
    layers = Layers(stem, f"{ROOT}model.layers", numbers, "mlp", linears, [f"self_attn.{p}" for p in projections], True)
    tensors = read_layers(weights, config, layers, what, problems)
    return Adapter(config, tensors, (*notes, *more, *not_adapted(linears, config)))
