"""Batches and losses that the tests of the router loss share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphmoe_model import FusedGraphMoEFFN
from graphmoe_model.routing.record import RoutingRecord
from tests.model.tiny_models import tokens

IDS = tokens(4, 12)
LEFT_PADDED = torch.ones_like(IDS).index_fill(1, torch.arange(2), 0)
LEFT_PADDED[3, :7] = 0
RIGHT_PADDED = LEFT_PADDED.flip(1)


def ffn_layers(model: nn.Module) -> list[FusedGraphMoEFFN]:
    return [module for module in model.modules() if isinstance(module, FusedGraphMoEFFN)]


def records(model: nn.Module) -> list[RoutingRecord]:
    """What the routers of the last training forward recorded, in the order in which they ran."""
    seen = ffn_layers(model)[0].routing_context.seen
    return [] if seen is None else seen.records


def language_loss(model: nn.Module, **inputs: Tensor) -> Tensor:
    """The loss without the router's: the same training forward, with the coefficients at zero."""
    configs = [layer.lora_graphmoe["default"].config for layer in ffn_layers(model)]
    coefficients = [config.router_aux_loss_coef for config in configs]
    try:
        for config in configs:
            config.router_aux_loss_coef = 0.0
        return model(**inputs).loss
    finally:
        for config, coefficient in zip(configs, coefficients, strict=True):
            config.router_aux_loss_coef = coefficient
