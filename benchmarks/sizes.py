"""The models whose layers are timed, by name: sizes from their published configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

from graphmoe_kernels.cost import Sizes
from graphmoe_model.base_models import MODEL_SHAPES
from graphmoe_tables.methods import METHODS as KNOWN_METHODS


class Model(NamedTuple):
    """A decoder-only model."""

    name: str  # as options and results call it
    hidden: int  # D
    intermediate: int  # F
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 8  # of the adapter that is timed on it, unless a case says otherwise
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


def _published(name: str) -> Model:
    p = MODEL_SHAPES[name]
    return Model(name, p.hidden_size, p.intermediate_size, p.num_attention_heads, p.num_key_value_heads, p.head_dim)


def _changes(name: str) -> dict[str, Any]:
    method = KNOWN_METHODS[name]
    return {
        "routers": method.routers or "none",
        "experts": method.num_experts,
        "top_k": method.top_k,
        "rank": method.published_rank,
    }


# The methods of the package, as what they change in a layer's sizes; experts, top-k and ranks are the papers' (the
# presets').
METHODS: dict[str, dict[str, Any]] = {name: _changes(name) for name in KNOWN_METHODS}


# For tests and continuous integration: every code path in a moment, figures that mean nothing.
TINY = Model("tiny", 64, 160, heads=4, kv_heads=2, head_dim=16, experts=4, rank=4)
# A small model that is trained on CPUs.
SMALL = Model("smollm2-135m", 576, 1536, heads=9, kv_heads=3, head_dim=64)
MODELS = {model.name: model for model in (TINY, SMALL, *map(_published, ("llama-3.2-1b", "llama-3-8b", "qwen3-4b")))}
# Of the whole models that are made here.
VOCABULARY = 8_192
