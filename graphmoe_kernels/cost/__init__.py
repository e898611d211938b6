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

from graphmoe_kernels.cost.counter import count_flops as count_flops
from graphmoe_kernels.cost.counter import count_layer as count_layer
from graphmoe_kernels.cost.model import Traffic as Traffic
from graphmoe_kernels.cost.model import fold_build as fold_build
from graphmoe_kernels.cost.model import fold_bytes as fold_bytes
from graphmoe_kernels.cost.model import further_round as further_round
from graphmoe_kernels.cost.model import layer_terms as layer_terms
from graphmoe_kernels.cost.model import multiply_adds as multiply_adds
from graphmoe_kernels.cost.model import traffic as traffic
from graphmoe_kernels.cost.sizes import DTYPES as DTYPES
from graphmoe_kernels.cost.sizes import Sizes as Sizes
from graphmoe_kernels.cost.terms import COUNTS as COUNTS
from graphmoe_kernels.cost.terms import FORMS as FORMS
from graphmoe_kernels.cost.terms import Term as Term
from graphmoe_kernels.cost.terms import round_terms as round_terms
