"""How evenly experts share the tokens of each task (GraphMoE, Fig. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from graphmoe_model.analysis.prompts import read_prompts
from graphmoe_model.analysis.routers import mlp_routers, of_mlps
from graphmoe_model.routing.expert_load import collect_routing


class RoundBalance(NamedTuple):
    """How even the shares of one round are, as means over routers.

    Attributes:
        deviation: the standard deviation of the n experts' shares; 0 where all are 1/n.
        variation: that over the mean share; 0 where the load is even, sqrt(n - 1) where one expert has all.
        largest, smallest: the share of the expert that got most and of the one that got least.
        unused: how many experts of all routers no token went to.
    """

    deviation: float
    variation: float
    largest: float
    smallest: float
    unused: int


class TaskBalance(NamedTuple):
    """The load of one adapter's experts on one task.

    Attributes:
        adapter, task: their names.
        tokens: how many were counted: those of the prompts.
        shares: router name -> [T, n], each round's adding up to 1; of the choices, or of the routing probability where
            routing is dense.
        rounds: by round, of the routers of MLPs.
        attention: of the routers on attention projections, which run in no rounds; None where there are none.
    """

    adapter: str
    task: str
    tokens: int
    shares: dict[str, list[list[float]]]
    rounds: list[RoundBalance]
    attention: RoundBalance | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        attention = None if self.attention is None else self.attention._asdict()
        return {**self._asdict(), "rounds": [own._asdict() for own in self.rounds], "attention": attention}


def task_balance(
    model: Any,
    adapter: str,
    task: str,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> TaskBalance:
    """Count where the tokens of a task's prompts go.

    Args:
        model: with an adapter that has routers.
        adapter, task: what the result calls them.
        prompts: token ids of each.
        batch_size: prompts per forward.
        progress: is told how many of how many prompts are done.

    Raises:
        TypeError: the model has no GraphMoE layer.
        ValueError: none of its MLPs has a router.
    """
    routers = mlp_routers(model)
    with collect_routing(model) as load:
        read_prompts(model, prompts, batch_size, progress)
    shares = {name: own.tolist() for name, own in load.load().items()}
    elsewhere = {name: own for name, own in shares.items() if name not in routers}
    (attention,) = round_balances(elsewhere) if elsewhere else (None,)
    return TaskBalance(
        adapter, task, sum(map(len, prompts)), shares, round_balances(of_mlps(shares, routers)), attention
    )


def round_balances(shares: Mapping[str, Sequence[Sequence[float]]]) -> list[RoundBalance]:
    """Return how even each round's shares are; routers may have different numbers of experts.

    Args:
        shares: router name -> [T, n].
    """
    rounds = zip(*shares.values(), strict=True)  # of each round, the shares of every router
    return [_round_balance(list(routers)) for routers in rounds]


def _round_balance(routers: Sequence[Sequence[float]]) -> RoundBalance:
    deviations = [_deviation(shares) for shares in routers]
    return RoundBalance(
        deviation=fmean(deviations),
        variation=fmean(own * len(shares) for own, shares in zip(deviations, routers, strict=True)),
        largest=fmean(map(max, routers)),
        smallest=fmean(map(min, routers)),
        unused=sum(share == 0 for shares in routers for share in shares),
    )


def _deviation(shares: Sequence[float]) -> float:
    mean = 1 / len(shares)
    return math.sqrt(math.fsum((share - mean) ** 2 for share in shares) / len(shares))
