"""The router's load-balance loss (GraphMoE, Eq. 8), computed from the routers' records.

Per layer and round L = n * sum_i f_i p_i, with f_i expert i's share of all top-k choices (sum_i f_i = 1) and p_i its
mean routing probability over the tokens, padding left out of both. Perfectly balanced routing gives L = 1 in the
switch form, where p is the full softmax, and L = the mean probability mass of the k chosen experts (at most 1) in the
paper's form, where p is zero outside the top k. L is averaged over rounds and routers (one per layer, or per linear).

Eq. 8 is taken over one forward, of one process or of all (`graphmoe_model.routing.global_routing`). Under gradient
accumulation the micro-batches' losses are averaged, which differs from Eq. 8 over the whole batch by the covariance of
f and p among micro-batches: it falls as 1 / (tokens per micro-batch).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphmoe_model.routing.record import ForwardRouting, contexts_of, in_backward, routed_layers
from graphmoe_model.routing.statistics import RoutingStatistics

_NO_GRADIENT = (
    "the router loss has no gradient: reentrant activation checkpointing runs the layers without one. Set "
    "gradient_checkpointing_kwargs={'use_reentrant': False} (activation_checkpointing_kwargs in newer Transformers), "
    "or router_aux_loss_coef=0"
)
_NOT_RECORDED = (
    "no routing is recorded: run a forward in training mode (model.train()) and with gradients enabled first"
)
_NOT_REPEATED = (
    "router_loss was called in a function that activation checkpointing repeats in the backward pass, but the forward "
    "whose loss it asks for is not repeated with it: call it outside of that function"
)


class RouterLoss(NamedTuple):
    """One forward's router loss.

    Attributes:
        balance: scalar, Eq. 8 averaged over routers and rounds.
        weighted: scalar, the same with every layer's ``router_aux_loss_coef``.
        coefficients: the values that ``router_aux_loss_coef`` has among the layers.
    """

    balance: Tensor
    weighted: Tensor
    coefficients: set[float]


def balance_loss(statistics: RoutingStatistics) -> Tensor:
    """Compute Eq. 8 of one router, averaged over its rounds: a scalar in the dtype of the sums, 0 without tokens."""
    chosen, probability_sums, num_tokens = statistics
    share = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)  # f, [T, n]
    probability = probability_sums / num_tokens.clamp(min=1)  # p, [T, n]
    return chosen.shape[-1] * (share * probability).sum(dim=-1).mean()


def loss_of(forwards: list[ForwardRouting]) -> RouterLoss | None:
    """Compute the loss of all routers of one forward; None without routers.

    Args:
        forwards: one for each context: one of a model, several where a model was put together of several.

    Raises:
        RuntimeError: gradients are enabled and a router that trains would get none.
    """
    records = [record for forward in forwards for record in forward.records]
    if torch.is_grad_enabled() and any(r.trains and not all(x.requires_grad for x in r.logits) for r in records):
        raise RuntimeError(_NO_GRADIENT)
    losses = [_losses(forward) for forward in forwards if forward.has_routers()]
    if not losses:
        return None
    device = losses[0].balance.device
    balance, weighted, counted = (
        torch.cat([own[i].to(device) for own in losses])  # type: ignore[union-attr]
        for i in range(3)
    )
    routers = counted.sum().clamp(min=1)  # a scaling of 0 runs no router on any process
    coefficients = {coefficient for own in losses for coefficient in own.coefficients}
    return RouterLoss((balance * counted).sum() / routers, (weighted * counted).sum() / routers, coefficients)


class _Losses(NamedTuple):
    """The losses of one forward's R routers.

    Attributes:
        balance: [R], Eq. 8.
        weighted: [R], the same times the coefficients.
        counted: [R], 0 for a router that ran on no process, else 1.
        coefficients: R weights.
    """

    balance: Tensor
    weighted: Tensor
    counted: Tensor
    coefficients: list[float]


def _losses(forward: ForwardRouting) -> _Losses:
    everywhere = forward.all_processes
    if everywhere is None:
        statistics = [record.statistics() for record in forward.records]
        coefficients = [record.coefficient for record in forward.records]
    else:
        statistics, coefficients = everywhere.statistics, everywhere.coefficients
    losses = [balance_loss(own) for own in statistics]
    balance = torch.stack([loss.to(losses[0].device) for loss in losses])
    weighted = torch.stack([c * loss for c, loss in zip(coefficients, balance.unbind(), strict=True)])
    counted = torch.ones_like(balance) if everywhere is None else everywhere.ran.clamp(max=1)
    return _Losses(balance, weighted, counted, coefficients)


def router_loss(model: nn.Module) -> Tensor:
    """Return the last training forward's router loss, ready to be added: ``router_aux_loss_coef`` * Eq. 8, a scalar.

    For training loops that compute their loss from the logits. Where labels are given to a model with the adapter,
    ``outputs.loss`` contains this loss already. With gradients enabled, forwards without them (a reference model's,
    an evaluation's, ``generate``'s) and forwards with the adapter disabled do not count as the last one. Under
    ``torch.no_grad()`` it is a reading, allowed at any time.

    Several forwards before one backward: ask for it after each, and add what it gives. With
    ``router_aux_loss_scope="global"`` the forward itself took part in the collective; asking takes part in none.

    Raises:
        TypeError: there is no GraphMoE layer in ``model``.
        RuntimeError: no training forward was recorded, or the loss is in ``outputs.loss`` already, or it has no
            gradient (reentrant checkpointing).
    """
    layers = list(routed_layers(model).values())
    if not layers:
        raise TypeError(f"no GraphMoE layer in this {type(model).__name__}, so there is no router loss")
    last = [context.last() for context in contexts_of(layers)]
    forwards = [forward for forward in last if forward is not None]
    if torch.is_grad_enabled() and any(forward.in_loss for forward in forwards):
        raise RuntimeError(
            "the last forward was given labels, so outputs.loss contains the router loss already and adding it would "
            "count it twice; use outputs.loss as it is, pass no labels, or read the value under torch.no_grad()"
        )
    loss = loss_of(forwards)
    if loss is None:
        if coefficient_of(layers) > 0:
            raise RuntimeError(_NOT_RECORDED if not in_backward() else _NOT_REPEATED)
        return torch.zeros((), device=next(model.parameters()).device)
    for forward in forwards:
        forward.unused = False
    return loss.weighted


def coefficient_of(layers: list[Any]) -> float:
    """Return the largest ``router_aux_loss_coef`` among the layers' active adapters; 0 without any."""
    configs = [layer.active_config() for layer in layers]
    return max((config.router_aux_loss_coef for config in configs if config is not None), default=0.0)
