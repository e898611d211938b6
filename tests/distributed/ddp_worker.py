"""Training over one process or several: the same scenario for test_ddp.py's two ranks and for the process beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from graphmoe_model import collect_routing, router_loss
from tests.model.checkpointing import checkpoint_activations
from tests.model.method_models import adapted, randomise, trained_parameters
from tests.model.tiny_models import PADDING, tiny_model, tokens

Batch = dict[str, Tensor]
LENGTHS = ([12, 3, 8], [5])  # of the rows of each rank: ragged, and other numbers of rows and tokens
STEPS = 2


@dataclass(frozen=True)
class Scenario:
    """How a tiny fp64 model trains for two steps.

    Attributes:
        form: of `tests.model.method_oracles.FORMS`.
        options: of its configuration.
        loss: ``"labels"``: ``outputs.loss``, divided as Trainer does; ``"by hand"``: `router_loss` added to a loss of
            one's own.
        checkpointing: whether activations are.
        compiled: whether the model is, where there are several processes.
        sharded: by FSDP2 in place of DDP.
        ddp: options of ``DistributedDataParallel``.
        optimizer: ``"AdamW"`` or ``"SGD"``.
        accumulation: micro-batches per step.
        full_rows: no padding anywhere, and no mask.
        layers: decoder layers.
    """

    form: str = "graphmoe-mixlora"
    options: dict[str, Any] = field(default_factory=dict)
    loss: str = "labels"
    checkpointing: bool = False
    compiled: bool = False
    sharded: bool = False
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "AdamW"
    accumulation: int = 1
    full_rows: bool = False
    layers: int = 2


@dataclass
class Result:
    """What two steps left.

    Attributes:
        counts: by router, tokens of the first micro-batch that chose each expert; a rank's own.
        losses: of every step; a rank's own.
        gradients: of every step, by parameter.
        parameters: after the last step.
    """

    counts: dict[str, Tensor]
    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]


def model_of(scenario: Scenario) -> nn.Module:
    """The adapted model, away from its start, with the router loss weighing a good part."""
    torch.manual_seed(0)
    model = adapted(
        scenario.form, tiny_model(use_cache=False, num_hidden_layers=scenario.layers), **scenario.options
    ).double()
    randomise(model)
    if scenario.checkpointing:
        checkpoint_activations(model)
        model.enable_input_require_grads()
    return model.train()


def micro_batch(step: int, index: int, rank: int, full_rows: bool = False) -> Batch:
    """A rank's rows, padded on the right; without a mask where nothing is padded."""
    lengths = torch.tensor([6, 6] if full_rows else LENGTHS[rank])[:, None]
    longest = int(lengths.max())
    ids = tokens(len(lengths), longest, seed=100 * step + 10 * index + rank)
    real = torch.arange(longest) < lengths
    ids = ids.masked_fill(~real, PADDING)
    return {"input_ids": ids, "labels": ids.masked_fill(~real, -100), "attention_mask": real.long()}


def joined(batches: list[Batch]) -> Batch:
    """The global batch of the ranks' batches, padded to the longest row."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": PADDING, "labels": -100, "attention_mask": 0}
    return {
        name: torch.cat([F.pad(b[name], (0, longest - b[name].shape[1]), value=value) for b in batches])
        for name, value in fill.items()
    }


def items_in(batches: list[Batch]) -> Tensor:
    """The number of labels that are predicted, as Trainer counts them for ``num_items_in_batch``."""
    return torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in batches]).sum()


def loss_of(forward: nn.Module, model: nn.Module, batch: Batch, items: Tensor, scenario: Scenario) -> Tensor:
    """A micro-batch's part of the step's loss; all parts of all processes add up to the step's."""
    batch = dict(batch)
    if batch["attention_mask"].all():
        del batch["attention_mask"]
    if scenario.loss == "labels":
        return forward(**batch, num_items_in_batch=items).loss
    labels = batch.pop("labels")
    logits = forward(**batch).logits[:, :-1].flatten(0, 1)
    language = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / items
    if scenario.options.get("router_aux_loss_coef", 0) == 0:
        return language
    return language + router_loss(model) / scenario.accumulation / processes()


def processes() -> int:
    """W; 1 without a group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def train(
    scenario: Scenario, wrap: Callable[[nn.Module], nn.Module], batches_of: Callable[[int], list[Batch]], items: Any
) -> Result:
    """Two optimizer steps.

    Args:
        wrap: makes the model parallel.
        batches_of: a step's number -> this process's micro-batches.
        items: a step's number -> the labels of all processes' micro-batches.
    """
    model = model_of(scenario)
    forward = wrap(model)
    if scenario.compiled and processes() > 1:
        forward = torch.compile(forward, backend="eager")
    optimizer = getattr(torch.optim, scenario.optimizer)(trained_parameters(model).values(), lr=0.01)
    losses, gradients = [], []
    with torch.no_grad(), collect_routing(model) as routing:
        model.eval()(**batches_of(0)[0])
    model.train()
    for step in range(STEPS):
        batches, total = batches_of(step), torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(batches):
            if isinstance(forward, DistributedDataParallel):
                forward.require_backward_grad_sync = index == len(batches) - 1
            loss = (
                loss_of(forward, model, batch, items(step), scenario) * processes()
            )  # as Trainer: averaged away again
            loss.backward()
            total += loss.detach()
        losses.append(total)
        gradients.append({name: whole(p.grad) for name, p in trained_parameters(model).items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return Result(
        routing.counts, losses, gradients, {name: whole(p.detach()) for name, p in trained_parameters(model).items()}
    )


def whole(tensor: Tensor) -> Tensor:
    """A copy, gathered if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def parallel(scenario: Scenario) -> Result:
    """On every rank: its own micro-batches, under DDP or FSDP2."""
    rank = distributed.get_rank()

    def wrap(model: nn.Module) -> nn.Module:
        if not scenario.sharded:
            return DistributedDataParallel(model, **scenario.ddp)
        from torch.distributed.fsdp import fully_shard

        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        return fully_shard(model)

    return train(
        scenario, wrap, lambda step: rank_batches(scenario, step, rank), lambda step: all_items(scenario, step)
    )


def alone(scenario: Scenario, *, joined_batches: bool = True) -> Result:
    """In one process without a group: the global micro-batches or, as accumulation, each rank's in turn."""

    def batches(step: int) -> list[Batch]:
        ranks = [rank_batches(scenario, step, rank) for rank in (0, 1)]
        if joined_batches:
            return [joined(list(pair)) for pair in zip(*ranks, strict=True)]
        return [batch for pair in zip(*ranks, strict=True) for batch in pair]

    return train(scenario, lambda model: model, batches, lambda step: all_items(scenario, step))


def rank_batches(scenario: Scenario, step: int, rank: int) -> list[Batch]:
    return [micro_batch(step, index, rank, scenario.full_rows) for index in range(scenario.accumulation)]


def all_items(scenario: Scenario, step: int) -> Tensor:
    return items_in([batch for rank in (0, 1) for batch in rank_batches(scenario, step, rank)])


def run_all(scenarios: dict[str, Scenario]) -> dict[str, Result]:
    """Every scenario, in one pair of processes."""
    return {name: parallel(scenario) for name, scenario in scenarios.items()}
