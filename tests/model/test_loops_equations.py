"""Two checkpointed forwards and one backward against the equations: every layer and Eq. 8 written out, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from graphmoe_model import GraphMoEConfig
from graphmoe_model.layers.routed_layer import RoutedLayer
from tests.model import method_oracles
from tests.model.loops import (
    FORMS,
    Batch,
    assert_same_gradients,
    batch,
    checkpointed,
    gradients_of,
    loop_model,
    pairwise_loss,
    policy_forward,
    score,
)

pytestmark = pytest.mark.methods
BATCHES = [batch(1), batch(2, "right", length=11)]


def eq8(scores: Tensor, kept: Tensor, config: GraphMoEConfig) -> Tensor:
    """n sum_i f_i p_i of one router in one round: scores [N, n], kept [N] bool."""
    p = scores[kept].softmax(-1)
    chosen = torch.zeros_like(p).scatter(-1, p.topk(config.top_k, dim=-1).indices, 1.0)
    f = chosen.sum(0) / chosen.sum()
    counted = p * chosen if config.router_aux_loss == "paper" else p
    return p.shape[1] * (f * counted.mean(0)).sum()


@contextmanager
def kept_scores(into: list[Tensor]) -> Iterator[None]:
    """The logits [N, n] of every router that the equations ask from now on, with their graph."""
    route = method_oracles.routing_weights

    def remember(x: Tensor, router: Tensor, config: GraphMoEConfig, logits: list[Tensor] | None) -> Tensor:
        into.append((x @ router.T).flatten(0, -2))
        return route(x, router, config, logits)

    with mock.patch.object(method_oracles, "routing_weights", remember):
        yield


def layer_by_equations(layer: RoutedLayer, found: list[list[Tensor]], x: Tensor) -> Tensor:
    """A layer's output; its routers' scores go into ``found``, one list of rounds a router."""
    scores: list[Tensor] = []
    with kept_scores(scores):
        y = method_oracles.by_equations(layer, x)
    config = layer.lora_graphmoe["default"].config
    linears = 3 if hasattr(layer.base_layer, "gate_proj") and config.base_method.routers == "linear" else 1
    found.extend(scores[i::linears] for i in range(min(linears, len(scores))))
    return y


def forward_by_equations(model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
    """As `policy_forward`: scores [B] and the weighted router loss, a mean over routers of the mean over rounds."""
    found: list[list[Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    for layer in layers:
        layer.forward = partial(layer_by_equations, layer, found)
    value = score(model(**inputs).logits, inputs)
    config = layers[0].lora_graphmoe["default"].config
    if not config.router_aux_loss_coef:
        return value, value.new_zeros(())
    kept = inputs["attention_mask"].flatten().bool()
    routers = [torch.stack([eq8(scores, kept, config) for scores in rounds]).mean() for rounds in found]
    return value, config.router_aux_loss_coef * torch.stack(routers).mean()


def backward_of_two(forward, model: nn.Module) -> dict[str, Tensor]:
    (first, router), (second, other) = (forward(model, inputs) for inputs in BATCHES)
    (pairwise_loss(first, second) + router + other).backward()
    return gradients_of(model)


@pytest.mark.parametrize(
    "form", [form if form == "graphmoe-mola" else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_two_forwards_follow_the_equations(form):
    """Value and every gradient of a pairwise loss over two paddings, with checkpointing."""
    model = loop_model(form)
    equations = copy.deepcopy(model).eval()
    checkpointed(model)
    for inputs in BATCHES:
        with torch.no_grad():
            for found, expected in zip(
                policy_forward(model, inputs), forward_by_equations(equations, inputs), strict=True
            ):
                torch.testing.assert_close(found, expected, check_dtype=False)
    expected = backward_of_two(forward_by_equations, equations)
    assert_same_gradients(backward_of_two(policy_forward, model), expected)
