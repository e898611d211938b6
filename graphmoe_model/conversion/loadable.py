"""Whether a configuration selects just the modules that an adapter has tensors for: what no loader could mend."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from graphmoe_kernels import FLOAT_DTYPES
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.conversion.modules import Module
from graphmoe_model.messages import some

_LAYER = re.compile(r"0|[1-9][0-9]{0,4}")  # as PyTorch names the entries of a list; more than any decoder has


def check_values(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors of a dtype that is not computed in, or with NaN or infinite values.

    Raises:
        ValueError: names the first of them.
    """
    narrow = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in FLOAT_DTYPES]
    if narrow:
        raise ValueError(
            f"{what} must hold tensors of float64, float32, float16 or bfloat16, got {some(narrow)}; cast them before"
        )
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:  # whatever they are converted to computes NaN
        raise ValueError(
            f"{what} has NaN or infinite values in {some(broken)}: training has diverged, or the file is damaged; "
            "take an earlier checkpoint"
        )


def selection_problems(config: GraphMoEConfig, modules: Sequence[Module]) -> list[str]:
    """Say why no loader finds these modules, and no others, by the configuration; nothing if one can.

    Without ``target_modules`` a loader finds the modules from the model, which is not at hand.
    """
    problems = [f"{module.path}: {part!r} is no number of a layer" for module in modules for part in _odd(module.path)]
    if problems or not modules:
        return problems
    if config.target_modules is not None:
        unselected = [m.path for m in modules if not check_target_module_exists(config, m.path)]
        if unselected:
            problems.append(
                f"the configuration (target_modules={_shown(config.target_modules)}, layers_to_transform, "
                f"exclude_modules) does not select {some(unselected)}, which has tensors"
            )
        problems += [f"{entry}: in target_modules, but it has no tensors" for entry in _idle_targets(config, modules)]
    problems += [f"layer {number}: in layers_to_transform, but it has no tensors" for number in _idle(config, modules)]
    return problems


def count_problems(config: GraphMoEConfig, modules: Sequence[Module], found: Mapping[str, int]) -> list[str]:
    """Say why no model's layers have, by ``num_experts``, the numbers of experts ``found`` by module path.

    A list says how many layers the model has; a pattern's groups may be those of any number that they divide.
    """
    if isinstance(config.num_experts, int):
        return []
    with_experts = [module for module in modules if module.path in found]
    outside = [module.path for module in with_experts if module.layer is None]
    if outside:
        return [f"num_experts={config.num_experts!r} has no number for {some(outside)}, in no numbered layer"]
    if len({module.stem for module in with_experts}) != 1:
        return []  # of several lists of layers it cannot be told here how a model counts them
    groups = len(config.expert_counts())
    last = max(module.layer for module in with_experts if module.layer is not None)
    longest = groups if isinstance(config.num_experts, list) else groups * (last + 1)
    if any(_fits(config.expert_counts(), length, with_experts, found) for length in range(groups, longest + 1, groups)):
        return []
    numbers = [f"{found[module.path]} in {module.path}" for module in with_experts]
    return [f"num_experts={config.num_experts!r} gives other numbers than the tensors have: {some(numbers)}"]


def _fits(counts: Sequence[int], length: int, modules: Sequence[Module], found: Mapping[str, int]) -> bool:
    """Tell whether a decoder of so many layers, in equal groups of ``counts`` experts, has the numbers ``found``."""
    groups = len(counts)
    return all(
        module.layer is not None
        and module.layer < length
        and counts[module.layer * groups // length] == found[module.path]
        for module in modules
    )


def _odd(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdecimal() and not _LAYER.fullmatch(part)]


def _shown(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets))


def _idle_targets(config: GraphMoEConfig, modules: Sequence[Module]) -> list[str]:
    """List the entries of ``target_modules`` that name no module; none where left-out layers may have them."""
    targets: Any = config.target_modules
    if isinstance(targets, str) or config.exclude_modules or config.layers_to_transform is not None:
        return []
    paths = [module.path for module in modules]
    return sorted(t for t in targets if not any(path == t or path.endswith(f".{t}") for path in paths))


def _idle(config: GraphMoEConfig, modules: Sequence[Module]) -> list[int]:
    wanted: Any = config.layers_to_transform
    if wanted is None or isinstance(config.target_modules, str):
        return []
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    return sorted(i for i in indices if not any(f".{i}." in f".{module.path}." for module in modules))
