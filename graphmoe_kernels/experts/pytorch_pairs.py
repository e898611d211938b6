"""The (token, slot) pairs of a round of experts on PyTorch, and the products of each pair with its own expert.

There are two ways to hold them, with the same methods. A pair's low-rank activations have q columns.

- `SortedPairs`, on a CPU: sorted by expert, so that every expert's product takes consecutive rows; q = r. The host
  reads once per call where they begin.
- `StackedSlots`, on other devices: slot after slot. One product takes the matrices of all experts, and a pair's
  activations are zero outside of its own expert's columns; q = n*r. Nothing waits for the device, and no size changes
  the number of calls. (On a CPU these products take three to five times as long as those of sorted pairs.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from graphmoe_kernels.experts.dropout import DrawnMask, dropout_mask
from graphmoe_kernels.experts.ids import check_ids, valid_tokens
from graphmoe_kernels.experts.operands import ExpertOperands
from graphmoe_kernels.experts.pytorch_blocks import block_size, compute_dtype, on_host, scratch
from graphmoe_kernels.structures import cast_tensor


class Pairs(Protocol):
    """The p = b * k pairs of b tokens. ``matrices`` and their gradients are [n, r, F].

    Attributes:
        tokens: which of the batch.
        weights: [p, 1], the routing weights. They and all results are in the dtype of the computation.
        mask: [p, F], the dropout mask, entries 0 or 1, or None.
    """

    tokens: slice
    weights: Tensor
    mask: Tensor | None

    def wide(self, name: str) -> Tensor:
        """Give memory for [p, F], on a CPU where the tensor of that name of the block before lay."""
        ...

    def spread(self, x: Tensor, out: Tensor) -> Tensor:
        """Give every pair its token's row of x [b, F], in ``out`` [p, F]."""
        ...

    def combine(self, x: Tensor, weighted: bool = False) -> Tensor:
        """Sum x [p, C] over each token's slots, times the routing weights if asked for: [b, C]."""
        ...

    def by_slot(self, x: Tensor) -> Tensor:
        """Put x [p, 1] in the order of tokens and slots: [b, k]."""
        ...

    def take(self, low: Tensor, part: int = 0) -> Tensor:
        """Give every pair its own expert's columns of part 0 or 1 of ``low`` [b, parts * n*r]: [p, q]."""
        ...

    def put(self, x: Tensor, out: Tensor, part: int = 0) -> None:
        """Write x [p, q] where `take` reads, to ``out`` [b, parts * n*r], which holds zeros."""
        ...

    def add_product(self, y: Tensor, low: Tensor, matrices: Tensor, scale: float = 1.0, keep: int = 1) -> Tensor:
        """Add scale * ``low`` [p, q] times each pair's matrix to y [p, F], or with ``keep`` 0 replace what y holds."""
        ...

    def reduce(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Multiply x [p, F] with the transpose of each pair's matrix: [p, q]."""
        ...

    def add_gradient(self, grad: Tensor, low: Tensor, d: Tensor, scale: float = 1.0) -> None:
        """Add the gradient of the matrices in `add_product`, from that of its result, d [p, F]."""
        ...

    def scaled(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Multiply x [p, F] with each pair's own of ``vectors`` [n, F]."""
        ...

    def add_vector_gradient(self, grad: Tensor, d: Tensor) -> None:
        """Add to ``grad`` [n, F] the sum of d [p, F] over each expert's pairs."""
        ...


def pairs_of(operands: ExpertOperands) -> Iterable[Pairs]:
    """Give the pairs of all tokens, on a CPU block by block.

    Raises:
        ValueError: on a CPU, an id outside of 0..n-1, or one that stands twice in a row.
    """
    return sorted_pairs(operands) if on_host(operands.low) else (StackedSlots(operands),)


def sorted_pairs(operands: ExpertOperands) -> Iterator[SortedPairs]:
    """Sort the pairs of every block by expert: one sort, and one reading of where experts begin, for all blocks."""
    n = operands.down_A.shape[0]
    check_ids(operands.expert_ids, n)
    ids = operands.expert_ids.long()
    tokens, slots = ids.shape
    size = block_size(operands.pre_activations.gate, slots)
    count = -(-tokens // size)
    counter = partial(torch.arange, device=ids.device)  # whatever the default device is
    block_of = counter(tokens).div_(size, rounding_mode="floor")
    ordered, order = torch.add(ids, block_of[:, None], alpha=n).flatten().sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, counter(len(order))).view(tokens, slots)
    bounds = torch.searchsorted(ordered, counter(count * n + 1)).tolist()
    drawn = None if operands.dropout is None else DrawnMask(*operands.dropout)
    for block in range(count):
        span = slice(block * size, min((block + 1) * size, tokens))
        starts = bounds[block * n : (block + 1) * n + 1]
        counts = [stop - start for start, stop in itertools.pairwise(starts)]
        own = order[starts[0] : starts[-1]] - starts[0]
        yield SortedPairs(operands, span, own, place[span] - starts[0], counts, drawn)


class SortedPairs:
    """The pairs of a block of tokens on a CPU, sorted by expert; see `Pairs`.

    Args:
        tokens: the block's slice of the batch.
        order: [p], the sorted pairs as indices into [b * k].
        place: [b, k], the inverse of ``order``.
        counts: each expert's number of pairs.
        drawn: draws the mask of a block after that of the block before.
    """

    def __init__(
        self,
        operands: ExpertOperands,
        tokens: slice,
        order: Tensor,
        place: Tensor,
        counts: list[int],
        drawn: DrawnMask | None,
    ) -> None:
        self.n, self.rank, self.width = operands.down_A.shape
        self.tokens, self.dtype, self.place = tokens, compute_dtype(operands.low.dtype), place
        self.counts = counts
        self.token = order.div(place.shape[1], rounding_mode="floor")  # [p], counted from the block's start
        self.expert = operands.expert_ids[tokens].reshape(-1).index_select(0, order).long()
        self.weights = cast_tensor(operands.routing_weights[tokens].reshape(-1, 1).index_select(0, order), self.dtype)
        self.mask = None if drawn is None else drawn.draw(tokens.stop - tokens.start, self.token, self.wide("mask"))

    def wide(self, name: str) -> Tensor:
        return scratch(name, self.weights.shape[0], self.width, self.dtype)

    def spread(self, x: Tensor, out: Tensor) -> Tensor:
        if x.dtype is self.dtype:
            return torch.index_select(x, 0, self.token, out=out)
        return out.copy_(x.index_select(0, self.token))

    def combine(self, x: Tensor, weighted: bool = False) -> Tensor:
        weights = self.by_slot(self.weights) if weighted else None
        return F.embedding_bag(self.place, x, mode="sum", per_sample_weights=weights)

    def by_slot(self, x: Tensor) -> Tensor:
        return x.view(-1)[self.place]

    def take(self, low: Tensor, part: int = 0) -> Tensor:
        rows, entry = self._rows_of_experts(low, part)
        return cast_tensor(rows.index_select(0, entry), self.dtype)

    def put(self, x: Tensor, out: Tensor, part: int = 0) -> None:
        rows, entry = self._rows_of_experts(out, part)
        rows.index_copy_(0, entry, cast_tensor(x, out.dtype))

    def _rows_of_experts(self, low: Tensor, part: int) -> tuple[Tensor, Tensor]:
        """Give ``low`` as one row of r for every token and expert, and which of them are the pairs' own, [p]."""
        tokens, parts = low.shape[0], 1 if self.rank == 0 else low.shape[1] // (self.n * self.rank)
        entry = self.token * (parts * self.n) + self.expert
        return low.reshape(tokens * parts * self.n, self.rank), entry.add_(part * self.n) if parts > 1 else entry

    def add_product(self, y: Tensor, low: Tensor, matrices: Tensor, scale: float = 1.0, keep: int = 1) -> Tensor:
        for own, own_low, matrix in zip(self._split(y), self._split(low), matrices, strict=True):
            own.addmm_(own_low, matrix, alpha=scale, beta=keep)
        return y

    def reduce(self, x: Tensor, matrices: Tensor) -> Tensor:
        found = x.new_empty(x.shape[0], self.rank)
        for own, own_x, matrix in zip(self._split(found), self._split(x), matrices.mT, strict=True):
            torch.mm(own_x, matrix, out=own)
        return found

    def add_gradient(self, grad: Tensor, low: Tensor, d: Tensor, scale: float = 1.0) -> None:
        for own, own_low, own_d in zip(grad, self._split(low), self._split(d), strict=True):
            own.addmm_(own_low.t(), own_d, alpha=scale)

    def scaled(self, x: Tensor, vectors: Tensor) -> Tensor:
        return x * vectors.index_select(0, self.expert)

    def add_vector_gradient(self, grad: Tensor, d: Tensor) -> None:
        for own, own_d in zip(grad, self._split(d), strict=True):
            own.add_(own_d.sum(0))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [p, C] expert by expert; none of its rows belong to an expert that nobody chose."""
        return x.split_with_sizes(self.counts)


class StackedSlots:
    """All pairs of a batch, slot after slot; see `Pairs`.

    Nobody reads the ids: those of a token that are none, or that stand twice, make it NaN.
    """

    def __init__(self, operands: ExpertOperands) -> None:
        self.n, self.rank, self.width = operands.down_A.shape
        self.tokens, self.dtype = slice(None), compute_dtype(operands.low.dtype)
        valid, ids = valid_tokens(operands.expert_ids, self.n)
        self.slots = ids.shape[1]
        self.expert = ids.t().reshape(-1)  # [p]
        self.chosen = self.expert[:, None] == torch.arange(self.n, device=ids.device)  # [p, n]
        weights = operands.routing_weights.masked_fill(~valid[:, None], torch.nan)
        self.weights = cast_tensor(weights.t().reshape(-1, 1), self.dtype)
        self.mask: Tensor | None = None
        if operands.dropout is not None:
            rate, seed = operands.dropout
            mask = dropout_mask(seed.to(ids.device), rate, ids, self.width)  # [N, k, F]
            self.mask = cast_tensor(mask.transpose(0, 1).flatten(0, 1), self.dtype)

    def wide(self, name: str) -> Tensor:
        return self.weights.new_empty(self.weights.shape[0], self.width)

    def spread(self, x: Tensor, out: Tensor) -> Tensor:
        return out.unflatten(0, (self.slots, -1)).copy_(x).flatten(0, 1)

    def combine(self, x: Tensor, weighted: bool = False) -> Tensor:
        if weighted:
            x = x * self.weights
        return x.unflatten(0, (self.slots, -1)).sum(0)

    def by_slot(self, x: Tensor) -> Tensor:
        return x.view(self.slots, -1).t()

    def take(self, low: Tensor, part: int = 0) -> Tensor:
        return self._own(cast_tensor(self._part(low, part), self.dtype).repeat(self.slots, 1))

    def put(self, x: Tensor, out: Tensor, part: int = 0) -> None:
        self._part(out, part).copy_(self.combine(x))

    def _part(self, low: Tensor, part: int) -> Tensor:
        columns = self.n * self.rank
        return low[:, part * columns : (part + 1) * columns]

    def _own(self, x: Tensor) -> Tensor:
        """x [p, n*r] with zeros outside of each pair's own expert's columns, whatever stands there."""
        mine = self.chosen[:, :, None]
        return x.view(x.shape[0], self.n, self.rank).masked_fill_(~mine, 0).flatten(1)

    def add_product(self, y: Tensor, low: Tensor, matrices: Tensor, scale: float = 1.0, keep: int = 1) -> Tensor:
        return y.addmm_(low, matrices.flatten(0, 1), alpha=scale, beta=keep)

    def reduce(self, x: Tensor, matrices: Tensor) -> Tensor:
        return self._own(x @ matrices.flatten(0, 1).t())

    def add_gradient(self, grad: Tensor, low: Tensor, d: Tensor, scale: float = 1.0) -> None:
        grad.flatten(0, 1).addmm_(low.t(), d, alpha=scale)

    def scaled(self, x: Tensor, vectors: Tensor) -> Tensor:
        return x * vectors.index_select(0, self.expert)

    def add_vector_gradient(self, grad: Tensor, d: Tensor) -> None:
        grad.addmm_(cast_tensor(self.chosen, d.dtype).t(), d)
