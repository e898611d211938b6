"""Whether experts specialise by round: an index, and what it would be if rounds did not matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

DRAWS = 1000


class Specialisation(NamedTuple):
    """How much a round tells about the expert that a token goes to, and what chance would give.

    The index is the mutual information of round and expert over log min(T, n / k), the most that k different experts
    per token and round leave: 0 where every round sends its tokens to the experts in the same shares, 1 where each has
    k experts that no other one uses. That takes T k experts. With fewer, 1 is where each round has k experts alone and
    every expert is in as many rounds; where T k is no multiple of n, the index stays below it. Where k is n, it is 0.

    The null distribution is that of the index where rounds mean nothing: each token's T sets of experts are dealt
    out anew among the rounds, in each of the draws the same way for all routers. Tokens are dealt independently of
    each other, so it says nothing about tokens that always go the same way.

    Attributes:
        information: the index of the choices.
        null_mean, null_95: mean and 95% quantile of the null distribution.
        p: the share of draws with an index at least as large, the observed one counted among them.
        kept: the share of a later round's choices that the same token's first round also made.
    """

    information: float
    null_mean: float
    null_95: float
    p: float
    kept: float

    def as_dict(self) -> dict[str, float]:
        """Return it as JSON takes it."""
        return dict(self._asdict())


def specialisation(
    choices: Mapping[str, Tensor],
    num_experts: Mapping[str, int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Specialisation], Specialisation]:
    """Return the specialisation by round of each router, and that of all: the mean of their indices.

    Args:
        choices: router name -> [T, N, k] expert ids, T at least 2, the same tokens in the same order.
        num_experts: router name -> n.
        draws: from the null distribution.
        seed: of the draws.
        progress: is told how many of how many draws are done.

    Raises:
        ValueError: no router, one round, no token, routers with different rounds or tokens, or no draws.
    """
    rounds, tokens = _check(choices, draws)
    indices = [round_index(ids, num_experts[name]) for name, ids in choices.items()]
    observed = torch.tensor(indices, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    null = torch.empty(draws, len(choices), dtype=torch.float64)
    for i in range(draws):
        order = torch.rand(rounds, tokens, generator=generator).argsort(dim=0)  # [T, N]: a permutation for each token
        for j, (name, ids) in enumerate(choices.items()):
            null[i, j] = round_index(ids, num_experts[name], order)
        if progress is not None:
            progress(i + 1, draws)
    kept = torch.tensor([_kept(ids) for ids in choices.values()], dtype=torch.float64)
    each = {name: _compared(observed[j], null[:, j], kept[j]) for j, name in enumerate(choices)}
    return each, _compared(observed.mean(), null.mean(dim=1), kept.mean())


def round_index(ids: Tensor, num_experts: int, order: Tensor | None = None) -> float:
    """Return the index of the choices [T, N, k] of one router with n experts; 0 where every token has all of them.

    Args:
        order: [T, N], for each token a permutation: which round its choices count for. None: their own.
    """
    rounds, _, k = ids.shape
    most = math.log(min(rounds, num_experts / k))  # H(E) <= log n, and H(E | T) >= log k
    if most == 0:
        return 0.0  # k is n, so no round can differ from another
    at = torch.arange(rounds)[:, None] if order is None else order  # [T, 1] or [T, N]
    cells = (at[..., None] * num_experts + ids).flatten()
    counts = torch.bincount(cells, minlength=rounds * num_experts).view(rounds, num_experts).double()
    shares = counts / counts.sum()  # [T, n], every round has the same sum
    expected = shares.sum(dim=0, keepdim=True) / rounds
    terms = torch.where(shares > 0, shares * (shares / expected).log(), 0.0)
    return max(0.0, float(terms.sum()) / most)


def _compared(index: Any, null: Tensor, kept: Any) -> Specialisation:
    as_large = int((null >= index - 1e-12).sum())  # dealt out to the same shares in another order of summation
    return Specialisation(
        information=float(index),
        null_mean=float(null.mean()),
        null_95=float(null.quantile(0.95)),
        p=(1 + as_large) / (1 + len(null)),
        kept=float(kept),
    )


def _kept(ids: Tensor) -> float:
    """The share of later rounds' choices that are among the first round's of the same token."""
    same = (ids[1:, :, :, None] == ids[:1, :, None, :]).any(dim=-1)  # [T - 1, N, k]
    return float(same.double().mean())


def _check(choices: Mapping[str, Tensor], draws: int) -> tuple[int, int]:
    shapes = {tuple(ids.shape[:2]) for ids in choices.values()}
    if len(shapes) != 1:
        raise ValueError(f"routers must be at least one, all with the same rounds and tokens, got {sorted(shapes)}")
    ((rounds, tokens),) = shapes
    if rounds < 2:
        raise ValueError("there is one round, so there are none to compare")
    if tokens < 1 or draws < 1:
        raise ValueError(f"at least one token and one draw are needed, got {tokens} and {draws}")
    return rounds, tokens
