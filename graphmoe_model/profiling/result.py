"""What a profile says: seconds by category for one model, adapter, phase and length."""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple

CATEGORIES = ("attention", "mlp", "experts", "routing", "gru", "other")
TITLES = {own: own for own in CATEGORIES} | {"mlp": "base MLP", "gru": "GRU"}  # in tables and pictures


class Profile(NamedTuple):
    """Where the time of one forward goes.

    Attributes:
        model: its name.
        adapter: ``"none"``, ``"LoRA"``, ``"MixLoRA, T = 1"``, ``"GraphMoE(MixLoRA), T = 3"``, ...
        phase: ``"prefill"`` (all tokens at once, an empty cache) or ``"decode"`` (one token, a cache of ``tokens``).
        tokens: the sequence's length.
        seconds: median over the repetitions of every one of `CATEGORIES`. On a GPU the time that the kernels launched
            in a category ran for, on a CPU the category's elapsed time. ``mlp`` is the frozen projections (a plain
            model's whole MLP), ``experts`` the low-rank products and the mixture, ``gru`` all that later rounds need
            besides them, ``other`` the rest of the forward: embeddings, norms, head.
        spread: the lowest and the highest share of every category over the repetitions.
        wall_seconds: median elapsed time of the same call, profiler and ranges off.
        profiled_wall_seconds: median elapsed time of the profiled call.
        repetitions: how many calls the medians are of.
    """

    model: str
    adapter: str
    phase: str
    tokens: int
    seconds: dict[str, float]
    spread: dict[str, tuple[float, float]]
    wall_seconds: float
    profiled_wall_seconds: float
    repetitions: int

    @property
    def total(self) -> float:
        """Add up the seconds of all categories."""
        return sum(self.seconds.values())

    def share(self, *categories: str) -> float:
        """Compute the categories' part of the total, 0 to 1."""
        return sum(self.seconds[category] for category in categories) / self.total

    def as_dict(self) -> dict[str, Any]:
        """Return what was profiled and its seconds, without what is said about the measurement."""
        return {
            "model": self.model,
            "adapter": self.adapter,
            "phase": self.phase,
            "tokens": self.tokens,
            "seconds": dict(self.seconds),
        }


def summarise(forwards: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Compute median seconds, and lowest and highest share, of every category over repeated forwards."""
    shares = [{name: spent / sum(forward.values()) for name, spent in forward.items()} for forward in forwards]
    seconds = {name: median(forward[name] for forward in forwards) for name in CATEGORIES}
    spread = {name: (min(s[name] for s in shares), max(s[name] for s in shares)) for name in CATEGORIES}
    return seconds, spread
