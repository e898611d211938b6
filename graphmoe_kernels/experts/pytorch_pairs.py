"""The (token, slot) pairs of a round of experts on PyTorch, and the products of each pair with its own expert.

There are two ways to hold them, with the same methods. A pair's low-rank activations have q columns.

- `SortedPairs`, on a CPU: sorted by expert within blocks of tokens, so that every expert's product takes consecutive
  rows, and few enough of them at a time for the cache; q = r. The host reads once per call where experts begin.
- `StackedSlots`, on other devices: slot after slot, all at once. One product takes the matrices of all experts, and a
  pair's activations are zero outside of its own expert's columns; q = n*r. Nothing waits for the device, and no size
  changes the number of calls. (On a CPU these products take three to five times as long as those of sorted pairs.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from graphmoe_kernels.experts.dropout import DrawnMask, dropout_mask
from graphmoe_kernels.experts.ids import check_ids, valid_tokens
from graphmoe_kernels.experts.operands import ExpertOperands
from graphmoe_kernels.experts.pytorch_blocks import block_size, compute_dtype, on_host, run_size, scratch
from graphmoe_kernels.experts.pytorch_protocols import Block, Pairs
from graphmoe_kernels.structures import cast_tensor


def pairs_of(operands: ExpertOperands) -> Pairs:
    """Give the pairs of all tokens.

    Raises:
        ValueError: on a CPU, an id outside of 0..n-1, or one that stands twice in a row.
    """
    return SortedPairs(operands) if on_host(operands.low) else StackedSlots(operands)


class Piece(NamedTuple):
    """Consecutive sorted pairs of one expert, from ``start`` to ``stop``."""

    expert: int
    start: int
    stop: int


def runs_of(starts: list[int], largest: int) -> Iterator[list[Piece]]:
    """Cut sorted pairs into runs of at most ``largest``: of several experts that have few, and of one, in even pieces,
    that has more.

    Args:
        starts: where each expert's pairs begin, and where the last one's end.
    """
    run: list[Piece] = []
    for expert, (start, stop) in enumerate(itertools.pairwise(starts)):
        count = -(-(stop - start) // largest)  # of none nothing
        cuts = [start + (stop - start) * i // count for i in range(count)] + [stop]
        for piece in itertools.starmap(partial(Piece, expert), itertools.pairwise(cuts)):
            if run and piece.stop - run[0].start > largest:
                yield run
                run = []
            run.append(piece)
    if run:
        yield run


class SortedPairs:
    """The pairs of a batch on a CPU, sorted by block of tokens and then by expert; see `Pairs`."""

    def __init__(self, operands: ExpertOperands) -> None:
        self.n, self.rank, self.width = operands.down_A.shape
        self.dtype, self.dropout = compute_dtype(operands.low.dtype), operands.dropout
        check_ids(operands.expert_ids, self.n)
        ids = operands.expert_ids.long()
        self.tokens, slots = ids.shape
        self.size = block_size(operands.pre_activations.gate)
        counter = partial(torch.arange, device=ids.device)  # whatever the default device is
        block_of = counter(self.tokens).div_(self.size, rounding_mode="floor")
        ordered, order = torch.add(ids, block_of[:, None], alpha=self.n).flatten().sort(stable=True)
        self.place = torch.empty_like(order).scatter_(0, order, counter(len(order))).view(self.tokens, slots)
        count = -(-self.tokens // self.size) * self.n
        self.bounds: list[int] = torch.searchsorted(ordered, counter(count + 1)).tolist()
        self.token = order.div(slots, rounding_mode="floor")  # [P]
        self.expert = ids.flatten().index_select(0, order)  # [P]
        self.weights = cast_tensor(operands.routing_weights.reshape(-1, 1).index_select(0, order), self.dtype)

    def blocks(self) -> Iterator[Block]:
        drawn = None if self.dropout is None else DrawnMask(*self.dropout)
        for block, first in enumerate(range(0, self.tokens, self.size)):
            span = slice(first, min(first + self.size, self.tokens))
            kept = None
            if drawn is not None:
                kept = drawn.draw(scratch("kept", span.stop - first, self.width, self.dtype))
            starts = self.bounds[block * self.n : (block + 1) * self.n + 1]
            pieces = runs_of(starts, run_size(self.width, self.dtype))
            yield Block(span, (SortedRun(self, run, first, kept) for run in pieces))

    def total(self, name: str, out: Tensor) -> Tensor:
        return (out if out.dtype is self.dtype else scratch(name, out.shape[0], self.width, self.dtype)).zero_()

    def by_slot(self, x: Tensor) -> Tensor:
        return x.view(-1)[self.place]

    def take(self, low: Tensor, part: int = 0) -> Tensor:
        rows, entry = self._rows_of_experts(low, part)
        return cast_tensor(rows.index_select(0, entry), self.dtype)

    def put(self, x: Tensor, out: Tensor, part: int = 0) -> None:
        rows, entry = self._rows_of_experts(out, part)
        rows.index_copy_(0, entry, cast_tensor(x, out.dtype))

    def _rows_of_experts(self, low: Tensor, part: int) -> tuple[Tensor, Tensor]:
        """Give ``low`` as one row of r for every token and expert, and which of them are the pairs' own, [P]."""
        parts = 2 if self.rank == 0 else low.shape[1] // (self.n * self.rank)
        entry = torch.add(self.expert, self.token, alpha=parts * self.n)
        return low.reshape(self.tokens * parts * self.n, self.rank), entry.add_(part * self.n) if part else entry


class SortedRun:
    """Pairs of a block of tokens on a CPU, sorted by expert; see `Run`.

    Args:
        pairs: of the batch.
        pieces: the experts that have such pairs.
        first: the block's first token.
        kept: [b, F], the mask of the block's tokens.
    """

    def __init__(self, pairs: SortedPairs, pieces: list[Piece], first: int, kept: Tensor | None) -> None:
        self.rows = slice(pieces[0].start, pieces[-1].stop)
        self.experts = [piece.expert for piece in pieces]
        self.counts = [piece.stop - piece.start for piece in pieces]
        self.dtype, self.expert = pairs.dtype, pairs.expert[self.rows]
        self.token = pairs.token[self.rows] - first  # [m]
        self.width = pairs.width
        self.mask = None if kept is None else self.spread(kept, "mask")

    def wide(self, name: str) -> Tensor:
        return scratch(name, len(self.token), self.width, self.dtype)

    def spread(self, x: Tensor, name: str) -> Tensor:
        if x.dtype is self.dtype:
            return torch.index_select(x, 0, self.token, out=self.wide(name))
        return self.wide(name).copy_(x.index_select(0, self.token))

    def add_to(self, total: Tensor, x: Tensor) -> None:
        total.index_add_(0, self.token, x)

    def product(self, low: Tensor, matrices: Tensor) -> Tensor:
        return self.add_product(self.wide("product").zero_(), low, matrices, 1.0)

    def add_product(self, y: Tensor, low: Tensor, matrices: Tensor, scale: float) -> Tensor:
        for e, own, own_low in zip(self.experts, self._split(y), self._split(low), strict=True):
            own.addmm_(own_low, matrices[e], alpha=scale)
        return y

    def reduce(self, x: Tensor, matrices: Tensor, out: Tensor) -> None:
        for e, own, own_x in zip(self.experts, self._split(out), self._split(x), strict=True):
            own.copy_(torch.mm(matrices[e], own_x.t()).t())  # in half of the time of own_x times the transpose

    def add_gradient(self, grad: Tensor, low: Tensor, d: Tensor, scale: float = 1.0) -> None:
        for e, own_low, own_d in zip(self.experts, self._split(low), self._split(d), strict=True):
            grad[e].addmm_(own_low.t(), own_d, alpha=scale)

    def scaled(self, x: Tensor, vectors: Tensor) -> Tensor:
        return x * vectors.index_select(0, self.expert)

    def add_vector_gradient(self, grad: Tensor, d: Tensor) -> None:
        for e, own_d in zip(self.experts, self._split(d), strict=True):
            grad[e].add_(own_d.sum(0))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [m, C] piece by piece."""
        return (x,) if len(self.counts) == 1 else x.split_with_sizes(self.counts)


class StackedSlots:
    """All pairs of a batch, slot after slot; see `Pairs` and `Run`; they are both.

    Nobody reads the ids: those of a token that are none, or that stand twice, make it NaN.
    """

    rows = slice(None)

    def __init__(self, operands: ExpertOperands) -> None:
        self.n, rank, self.width = operands.down_A.shape
        self.rank, self.dtype = self.n * rank, compute_dtype(operands.low.dtype)
        valid, ids = valid_tokens(operands.expert_ids, self.n)
        self.slots = ids.shape[1]
        self.expert = ids.t().reshape(-1)  # [P]
        self.chosen = self.expert[:, None] == torch.arange(self.n, device=ids.device)  # [P, n]
        weights = operands.routing_weights.masked_fill(~valid[:, None], torch.nan)
        self.weights = cast_tensor(weights.t().reshape(-1, 1), self.dtype)
        self.mask: Tensor | None = None
        if operands.dropout is not None:
            rate, seed = operands.dropout
            mask = dropout_mask(seed.to(ids.device), rate, ids, self.width)  # [N, k, F]
            self.mask = cast_tensor(mask.transpose(0, 1).flatten(0, 1), self.dtype)

    def blocks(self) -> Iterator[Block]:
        yield Block(slice(None), (self,))

    def total(self, name: str, out: Tensor) -> Tensor:
        return out if out.dtype is self.dtype else torch.empty_like(out, dtype=self.dtype)

    def by_slot(self, x: Tensor) -> Tensor:
        return x.view(self.slots, -1).t()

    def take(self, low: Tensor, part: int = 0) -> Tensor:
        return self._own(cast_tensor(self._part(low, part), self.dtype).repeat(self.slots, 1))

    def put(self, x: Tensor, out: Tensor, part: int = 0) -> None:
        self.add_to(self._part(out, part), x)

    def _part(self, low: Tensor, part: int) -> Tensor:
        return low[:, part * self.rank : (part + 1) * self.rank]

    def _own(self, x: Tensor) -> Tensor:
        """x [P, n*r] with zeros outside of each pair's own expert's columns, whatever stands there."""
        mine = self.chosen[:, :, None]
        return x.view(x.shape[0], self.n, self.rank // self.n).masked_fill_(~mine, 0).flatten(1)

    def wide(self, name: str) -> Tensor:
        return self.weights.new_empty(len(self.expert), self.width)

    def spread(self, x: Tensor, name: str) -> Tensor:
        return cast_tensor(x, self.dtype).repeat(self.slots, 1)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        total.copy_(x.unflatten(0, (self.slots, -1)).sum(0))

    def product(self, low: Tensor, matrices: Tensor) -> Tensor:
        return low @ matrices.flatten(0, 1)

    def add_product(self, y: Tensor, low: Tensor, matrices: Tensor, scale: float) -> Tensor:
        return y.addmm_(low, matrices.flatten(0, 1), alpha=scale)

    def reduce(self, x: Tensor, matrices: Tensor, out: Tensor) -> None:
        out.copy_(self._own(x @ matrices.flatten(0, 1).t()))

    def add_gradient(self, grad: Tensor, low: Tensor, d: Tensor, scale: float = 1.0) -> None:
        grad.flatten(0, 1).addmm_(low.t(), d, alpha=scale)

    def scaled(self, x: Tensor, vectors: Tensor) -> Tensor:
        return x * vectors.index_select(0, self.expert)

    def add_vector_gradient(self, grad: Tensor, d: Tensor) -> None:
        grad.addmm_(cast_tensor(self.chosen, d.dtype).t(), d)
