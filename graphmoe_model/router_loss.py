"""The router's load-balance loss (GraphMoE, Eq. 8), computed from the routers' records.

Per layer and round L = n * sum_i f_i p_i, with f_i expert i's share of all top-k choices (sum_i f_i = 1) and p_i its
mean routing probability over the tokens, padding left out of both. Perfectly balanced routing gives L = 1 in the
switch form, where p is the full softmax, and L = the mean probability mass of the k chosen experts (at most 1) in the
paper's form, where p is zero outside the top k. L is averaged over rounds and routers (one per layer, or per linear).

Eq. 8 is taken over one forward. Under gradient accumulation the micro-batches' losses are averaged, which differs from
Eq. 8 over the whole batch by the covariance of f and p among micro-batches: it falls as 1 / (tokens per micro-batch).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphmoe_model.routing_record import RoutingRecord, RoutingStatistics, contexts_of, in_backward, routed_layers

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
    """

    balance: Tensor
    weighted: Tensor


def balance_loss(statistics: RoutingStatistics) -> Tensor:
    """Eq. 8 of one router, averaged over its rounds: a scalar in the dtype of ``mass``, 0 without tokens."""
    counts, mass, tokens = statistics
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)  # f, [T, n]
    probability = mass / tokens.clamp(min=1)  # p, [T, n]
    return counts.shape[-1] * (share * probability).sum(dim=-1).mean()


def loss_of(records: list[RoutingRecord]) -> RouterLoss | None:
    """The loss of one forward's routers, None if there are none.

    Raises:
        RuntimeError: gradients are enabled and a router that trains would get none.
    """
    if not records:
        return None
    if torch.is_grad_enabled() and any(r.trains and not all(x.requires_grad for x in r.logits) for r in records):
        raise RuntimeError(_NO_GRADIENT)
    device = records[0].logits[0].device
    losses = [balance_loss(record.statistics()).to(device) for record in records]
    weighted = [record.coefficient * loss for record, loss in zip(records, losses, strict=True)]
    return RouterLoss(torch.stack(losses).mean(), torch.stack(weighted).mean())


def router_loss(model: nn.Module) -> Tensor:
    """The last training forward's router loss, ready to be added: ``router_aux_loss_coef`` * Eq. 8, a scalar.

    For training loops that compute their loss from the logits. Where labels are given to a model with the adapter,
    ``outputs.loss`` contains this loss already. With gradients enabled, forwards without them (a reference model's,
    an evaluation's, ``generate``'s) and forwards with the adapter disabled do not count as the last one. Under
    ``torch.no_grad()`` it is a reading, allowed at any time.

    Several forwards before one backward: ask for it after each, and add what it gives.

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
    loss = loss_of([record for forward in forwards for record in forward.records])
    if loss is None:
        if coefficient_of(layers) > 0:
            raise RuntimeError(_NOT_RECORDED if not in_backward() else _NOT_REPEATED)
        return torch.zeros((), device=next(model.parameters()).device)
    for forward in forwards:
        forward.unused = False
    return loss.weighted


def coefficient_of(layers: list[Any]) -> float:
    """The largest ``router_aux_loss_coef`` among the layers' active adapters; 0 without any."""
    configs = [layer.active_config() for layer in layers]
    return max((config.router_aux_loss_coef for config in configs if config is not None), default=0.0)
