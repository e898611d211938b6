"""The low-rank GRU that joins two rounds of self-rethinking (GraphMoE, Eq. 5 to 7)."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphmoe_kernels import GRUWeights
from graphmoe_model.layers.experts import own_parameter


class RethinkingGRU(nn.Module):
    """W_z, W_r, W_o [G, G + D] (the state's columns first), b_o [G] and W_g [D, G].

    W_g starts at zero, so a fresh layer's later rounds see the same input as its first; ``zero_output=False`` draws it
    (for tests that need every term to count). The modules hold parameters; the kernels do the arithmetic.
    """

    def __init__(self, hidden: int, width: int, zero_output: bool = True) -> None:
        super().__init__()
        self.update_gate = nn.Linear(width + hidden, width, bias=False)
        self.reset_gate = nn.Linear(width + hidden, width, bias=False)
        self.candidate = nn.Linear(width + hidden, width)
        self.output_proj = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.candidate.bias)
        if zero_output:
            nn.init.zeros_(self.output_proj.weight)

    def tensors(self) -> GRUWeights:
        """The parameters as the kernels take them."""
        parts: Any = self._modules
        return GRUWeights(
            own_parameter(parts["update_gate"], "weight"),
            own_parameter(parts["reset_gate"], "weight"),
            own_parameter(parts["candidate"], "weight"),
            own_parameter(parts["candidate"], "bias"),
            own_parameter(parts["output_proj"], "weight"),
        )
