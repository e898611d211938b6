"""What the two forms of (token, slot) pairs on PyTorch have in common; see `graphmoe_kernels.experts.pytorch_pairs`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class Run(Protocol):
    """The m pairs that are computed together. ``matrices`` and their gradients are [n, r, F].

    Attributes:
        rows: which of the P pairs.
        mask: [m, F], the dropout mask, entries 0 or 1, or None.
    """

    rows: slice
    mask: Tensor | None

    def wide(self, name: str) -> Tensor:
        """Give memory for [m, F], on a CPU where the tensor of that name of the run before lay."""
        ...

    def spread(self, x: Tensor, name: str) -> Tensor:
        """Give every pair its token's row of x [b, F], in memory of its own (`wide`): [m, F]."""
        ...

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """Add x [m, F] to the rows of the pairs' tokens in ``total`` [b, F], which `Pairs.total` gave."""
        ...

    def product(self, low: Tensor, matrices: Tensor) -> Tensor:
        """Multiply ``low`` [m, q] with each pair's matrix: [m, F]."""
        ...

    def add_product(self, y: Tensor, low: Tensor, matrices: Tensor, scale: float) -> Tensor:
        """Add scale * ``low`` [m, q] times each pair's matrix to y [m, F], and return it."""
        ...

    def reduce(self, x: Tensor, matrices: Tensor, out: Tensor) -> None:
        """Write the product of x [m, F] and the transpose of each pair's matrix to ``out`` [m, q]."""
        ...

    def add_gradient(self, grad: Tensor, low: Tensor, d: Tensor, scale: float = 1.0) -> None:
        """Add the gradient of the matrices in `add_product`, from that of its result, d [m, F]."""
        ...

    def scaled(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Multiply x [m, F] with each pair's own of ``vectors`` [n, F]."""
        ...

    def add_vector_gradient(self, grad: Tensor, d: Tensor) -> None:
        """Add to ``grad`` [n, F] the sum of d [m, F] over each expert's pairs."""
        ...


class Block(NamedTuple):
    """A block of b tokens.

    Attributes:
        tokens: which of the batch.
        runs: its pairs.
    """

    tokens: slice
    runs: Iterable[Run]


class Pairs(Protocol):
    """The P = N * k pairs of N tokens.

    Attributes:
        rank: q.
        weights: [P, 1], the routing weights. They and all results are in the dtype of the computation.
    """

    rank: int
    weights: Tensor

    def blocks(self) -> Iterator[Block]:
        """Give the blocks of tokens in their order."""
        ...

    def total(self, name: str, out: Tensor) -> Tensor:
        """Give where runs add up what ``out`` [b, F] is to hold; it is ``out`` itself where the dtype allows it."""
        ...

    def by_slot(self, x: Tensor) -> Tensor:
        """Put x [P, 1] in the order of tokens and slots: [N, k]."""
        ...

    def take(self, low: Tensor, part: int = 0) -> Tensor:
        """Give every pair its own expert's columns of part 0 or 1 of ``low`` [N, parts * n*r]: [P, q]."""
        ...

    def put(self, x: Tensor, out: Tensor, part: int = 0) -> None:
        """Write x [P, q] where `take` reads, to ``out`` [N, parts * n*r], which holds zeros."""
        ...
