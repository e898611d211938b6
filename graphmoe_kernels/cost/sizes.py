"""The sizes that a layer's cost depends on."""

from __future__ import annotations

from dataclasses import dataclass

from graphmoe_kernels.validation import check_choice, check_positive, check_top_k

# Of what kind the experts are: whole MLPs that one router chooses, mixed in every linear by its own router, or one.
ROUTERS = ("layer", "linear", "none")

# Bytes of an element, by the names that the command line takes.
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Sizes:
    """A layer and the tokens that run through it.

    Attributes:
        hidden, intermediate: D and F.
        gru_width: G, int(gru_hidden_scale * D).
        experts, top_k, rank: n, k, r.
        rounds: T.
        tokens: N in one call.
        routers: one for the layer, which chooses whole experts; one for each linear, which mixes its own; or none.
        dora: whether the experts have DoRA's magnitudes.
        dtype: of weights and activations, a name of `DTYPES`; the router's weights and logits are fp32 at least.

    Raises:
        TypeError: a size that is no int.
        ValueError: a size below 1, more experts per token than there are, several experts without a router, an unknown
            dtype or kind of routers.
    """

    hidden: int
    intermediate: int
    gru_width: int
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    rounds: int = 3
    tokens: int = 1
    dtype: str = "bf16"
    routers: str = "layer"
    dora: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "gru_width", "experts", "top_k", "rank", "rounds", "tokens"):
            check_positive(name, getattr(self, name))
        check_top_k(self.top_k, self.experts)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("routers", self.routers, ROUTERS)
        if self.routers == "none" and self.experts != 1:
            raise ValueError(f"{self.experts} experts need a router; without one there can be one expert")

    @property
    def element(self) -> int:
        """Return the bytes of an element."""
        return DTYPES[self.dtype]

    @property
    def router_element(self) -> int:
        """Return the bytes of an element of the router's weights and logits."""
        return max(4, self.element)

    @property
    def mixed(self) -> bool:
        """Tell whether every linear mixes its own experts."""
        return self.routers == "linear"

    @property
    def down_products(self) -> int:
        """Count the base down projections per round: one, but with DoRA on chosen experts one per slot."""
        return self.top_k if self.dora and not self.mixed else 1

    @property
    def used_experts(self) -> int:
        """Count the experts whose weights a round reads: the most that the tokens can choose."""
        return min(self.experts, self.tokens * self.top_k)
