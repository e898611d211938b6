"""What a rethinking layer costs by arithmetic: multiply-adds and bytes, term by term, for every form of it.

The forms are

- ``dense``: the frozen MLP alone, once: the yardstick;
- ``peers``: shared gate and up, the base down projection once per chosen expert (MixLoRA as published), T times;
- ``literal``: `graphmoe_kernels.rethink_literal`: the experts combined before one down projection, T times;
- ``folded``: `graphmoe_kernels.rethink_folded` with the fold at hand: the base projections once.

Two counts of each:

- ``needed``: chosen experts only, the GRU at its own width;
- ``executed``: what this package's PyTorch path multiplies. A (gate and up together) and B (down) of all n experts run
  as one product each. The folded form pads the GRU's width to a multiple of 16, and after every GRU step reads h and H
  in one product, with a matrix that is half zeros. For ``dense`` and ``peers`` both are the same.

`count_flops` reads the executed arithmetic off the running code, with PyTorch's own counter.

``python -m graphmoe_kernels.cost --hidden 4096 --intermediate 14336`` prints it all.
"""

from graphmoe_kernels.cost.counter import count_flops, count_layer
from graphmoe_kernels.cost.model import (
    Traffic,
    fold_build,
    fold_bytes,
    further_round,
    layer_terms,
    multiply_adds,
    traffic,
)
from graphmoe_kernels.cost.sizes import DTYPES, Sizes
from graphmoe_kernels.cost.terms import COUNTS, FORMS, Term, round_terms

__all__ = [
    "COUNTS",
    "DTYPES",
    "FORMS",
    "Sizes",
    "Term",
    "Traffic",
    "count_flops",
    "count_layer",
    "fold_build",
    "fold_bytes",
    "further_round",
    "layer_terms",
    "multiply_adds",
    "round_terms",
    "traffic",
]
