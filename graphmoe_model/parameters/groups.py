"""The optimizer's groups: experts, routers, GRUs and attention, each with a learning rate of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphmoe_model.parameters.counting import components_by_name

# The group of each component of `parameters_by_component` but the magnitudes, which are where their layer is.
GROUPS = {
    "experts": "experts",
    "routers": "router",
    "attention routers": "router",
    "GRU": "gru",
    "attention LoRA": "attention",
    "attention experts": "attention",
    "other": "other",
}


def optimizer_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    experts: float | None = None,
    router: float | None = None,
    gru: float | None = None,
    attention: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups, with every trainable parameter of the model in exactly one.

        torch.optim.AdamW(optimizer_groups(model, learning_rate=2e-4, gru=2e-5))

    Args:
        model: a model with an adapter, wrapped (DDP, FSDP2) or not.
        learning_rate: of every group that has none of its own, and of what is trained beside the method
            (``modules_to_save``), which is the group ``"other"``.
        experts: the rate of experts of MLPs, their DoRA magnitudes included.
        router: the rate of all routers.
        gru: the rate of the GRUs.
        attention: the rate of LoRA, experts and magnitudes on attention projections.
        weight_decay: of every group.

    Returns:
        Dictionaries with ``name``, ``params``, ``lr`` and ``weight_decay``, for those groups that have parameters.

    Raises:
        ValueError: nothing is trainable, a rate that is not above 0, or one for a group without parameters.
    """
    rates = {"experts": experts, "router": router, "gru": gru, "attention": attention}
    for name, rate in {"learning_rate": learning_rate, **rates}.items():
        if rate is not None and not rate > 0:
            raise ValueError(
                f"the learning rate {name} must be above 0, got {rate}; to freeze parameters, call "
                "requires_grad_(False) on them"
            )
    found: dict[str, list[nn.Parameter]] = {}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, component in components_by_name(model).items():
        found.setdefault(_group(name, component), []).append(parameters[name])
    if not found:
        raise ValueError(f"no parameter of this {type(model).__name__} is trainable; attach an adapter first")
    for name, rate in rates.items():
        if rate is not None and name not in found:
            there = ", ".join(own for own in (*rates, "other") if own in found)
            raise ValueError(
                f"a learning rate for {name} was given ({rate}), but the model trains no such parameters, only "
                f"{there}; leave it out"
            )
    return [
        {"name": name, "params": found[name], "lr": rates.get(name) or learning_rate, "weight_decay": weight_decay}
        for name in (*rates, "other")
        if name in found
    ]


def _group(name: str, component: str) -> str:
    """Name the group of a parameter, given its component."""
    if component != "magnitudes":
        return GROUPS[component]
    _, _, own = name.rpartition(".lora_graphmoe.")  # <adapter's name>.experts.gate_proj.magnitude, in an MLP
    return "experts" if own.split(".")[1:2] == ["experts"] else "attention"
