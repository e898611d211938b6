"""The models whose layers are timed, by name: sizes from their published configurations."""

from __future__ import annotations

from typing import NamedTuple

from graphmoe_kernels.cost import Sizes


class Model(NamedTuple):
    """A decoder-only model.

    Attributes:
        name: how options and results call it.
        hidden, intermediate: D and F.
        heads, kv_heads, head_dim: of the attention.
        layers: decoder layers.
        experts, rank: of the adapter that is timed on it, unless a case says otherwise.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    experts: int = 8
    rank: int = 16

    @property
    def gru_width(self) -> int:
        """G at the paper's scale of 0.1."""
        return int(0.1 * self.hidden)

    def sizes(
        self, tokens: int, rounds: int, dtype: str, experts: int | None = None, rank: int | None = None, top_k: int = 2
    ) -> Sizes:
        """A layer of this model in one case, with top-2 routing unless the case says otherwise."""
        return Sizes(
            self.hidden,
            self.intermediate,
            self.gru_width,
            experts=experts or self.experts,
            top_k=top_k,
            rank=rank or self.rank,
            rounds=rounds,
            tokens=tokens,
            dtype=dtype,
        )


MODELS = {
    model.name: model
    for model in (
        # For tests and continuous integration: every code path in a moment, figures that mean nothing.
        Model("tiny", 64, 160, heads=4, kv_heads=2, head_dim=16, layers=2, experts=4, rank=4),
        Model("llama-3.2-1b", 2048, 8192, heads=32, kv_heads=8, head_dim=64, layers=16),
        Model("llama-3-8b", 4096, 14336, heads=32, kv_heads=8, head_dim=128, layers=32),
        Model("qwen3-4b", 2560, 9728, heads=32, kv_heads=8, head_dim=128, layers=36),
    )
}
