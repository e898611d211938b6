"""PEFT's helpers for LoRA on models with experts: those that find layers and parameters by LoRA's classes and names.

They are changed where PEFT's functions look names up when they run, so that a program may have imported them before
this package. Models without experts are treated as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import peft.optimizers
from peft import helpers
from peft.optimizers import lorafa, loraplus, riemannian
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap
from torch import nn
from torch.optim import Optimizer

from graphmoe_model.config import GraphMoEPeftType
from graphmoe_model.layers.routed_layer import RoutedLayer

_LORA_FA = (
    "LoRA-FA is not supported with GraphMoE: its optimizer takes parameters in pairs of LoRA's A and B, and experts "
    "are stacked tensors with routers and a GRU beside them. To train B with A frozen, as LoRA-FA does, call "
    "requires_grad_(False) on the parameters whose names contain lora_A or end in .A, and use torch.optim.AdamW"
)
_RIEMANNIAN = (
    "create_riemannian_optimizer is not supported with GraphMoE: it preconditions pairs of LoRA's A and B and would "
    "leave the experts out; use torch.optim.AdamW, or peft.optimizers.create_loraplus_optimizer"
)
_HOTSWAP = (
    "hotswapping is not supported with GraphMoE. Load the new adapter beside the old one, model.load_adapter(path, "
    "'new'), and choose it with model.set_adapter('new'); one of the same sizes can also be loaded over the old one, "
    "model.load_adapter(path, 'default')"
)
_LORA_PLUS = (
    "this create_loraplus_optimizer was imported before graphmoe_model and would train the experts' B at A's rate; "
    "call peft.optimizers.create_loraplus_optimizer or graphmoe_model.create_loraplus_optimizer with the same arguments"
)

_peft_loraplus = loraplus.create_loraplus_optimizer
_through_ours: ContextVar[bool] = ContextVar("through_ours", default=False)


def create_loraplus_optimizer(
    model: Any, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Create PEFT's LoRA+ optimizer, in which the experts' B and magnitudes have the rate that LoRA's have.

    A, the routers and the GRU's matrices are trained with ``lr``; B and DoRA's magnitudes with ``lr *
    loraplus_lr_ratio``, and, as PEFT has it, every vector, which here is the GRU's bias.

    Args:
        model: a model with adapters; one without experts gets what PEFT gives.
        optimizer_cls, lr, loraplus_lr_ratio, kwargs: as in ``peft.optimizers.create_loraplus_optimizer``.
    """
    token = _through_ours.set(True)
    try:
        optimizer = _peft_loraplus(model, optimizer_cls, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, **kwargs)
    finally:
        _through_ours.reset(token)
    fast = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, RoutedLayer)
        for name, parameter in layer.lora_graphmoe.named_parameters()
        if name.rpartition(".")[2] in ("B", "magnitude")
    }
    slow_group, _, fast_group, _ = optimizer.param_groups  # A and others, embeddings, B, B without weight decay
    fast_group["params"] += [p for p in slow_group["params"] if id(p) in fast]
    slow_group["params"] = [p for p in slow_group["params"] if id(p) not in fast]
    return optimizer


def extend_peft_helpers() -> None:
    """Make PEFT's helpers act on experts, or refuse models that have them."""
    scaled: Any = (LoraLayer, RoutedLayer)
    helpers.LoraLayer = scaled  # type: ignore[misc]  # rescale_adapter_scale only ever passes it to isinstance
    for module in (loraplus, peft.optimizers):
        module.create_loraplus_optimizer = create_loraplus_optimizer  # type: ignore[attr-defined]
    loraplus.get_parameter_names = _refusing(loraplus.get_parameter_names, _LORA_PLUS, unless=_through_ours)
    create_lorafa = _refusing(lorafa.create_lorafa_optimizer, _LORA_FA)
    for module in (lorafa, peft.optimizers):
        module.create_lorafa_optimizer = create_lorafa  # type: ignore[attr-defined]
    lorafa.LoraFAOptimizer.__init__ = _without_experts(lorafa.LoraFAOptimizer.__init__)  # type: ignore[method-assign]
    riemannian._collect_lora_pairs = _refusing(riemannian._collect_lora_pairs, _RIEMANNIAN)
    hotswap._convert_scalings_to_tensor = _refusing(hotswap._convert_scalings_to_tensor, _HOTSWAP)
    hotswap.check_hotswap_configs_compatible = _without_swap(hotswap.check_hotswap_configs_compatible)


def _refusing(function: Callable[..., Any], message: str, unless: ContextVar[bool] | None = None) -> Callable[..., Any]:
    """Wrap a function that takes a model first: models with experts are refused with the message."""

    @wraps(function)
    def checked(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        allowed = unless is not None and unless.get()
        if not allowed and any(isinstance(module, RoutedLayer) for module in model.modules()):
            raise NotImplementedError(message)
        return function(model, *args, **kwargs)

    return checked


def _without_experts(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap LoraFAOptimizer's constructor to refuse experts: who imported its helper early comes here at last."""

    @wraps(init)
    def checked(self: Optimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        groups = [group for group in params if isinstance(group, dict) and "names" in group]
        named = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
        if any(".lora_graphmoe." in name for name, _ in named):
            trained = {name for name, parameter in named if parameter.requires_grad}
            for name, parameter in named:  # the helper has frozen each A whose B is trained
                if name.replace(".lora_A.", ".lora_B.") in trained:
                    parameter.requires_grad = True
            raise NotImplementedError(_LORA_FA)
        init(self, params, *args, **kwargs)

    return checked


def _without_swap(check: Callable[..., None]) -> Callable[..., None]:
    """Wrap PEFT's check of two adapters' configurations before a hotswap, to refuse this method's."""

    @wraps(check)
    def checked(config0: Any, config1: Any) -> None:
        if GraphMoEPeftType.GRAPHMOE in (config0.peft_type, config1.peft_type):
            raise NotImplementedError(_HOTSWAP)
        check(config0, config1)

    return checked
