"""Self-consistency (Wang et al., 2023) for answers of one token: sampled answers, of which the most frequent counts."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SelfConsistency:
    """How answers are sampled.

    Attributes:
        samples: M, how many answers per question, at least 1.
        temperature: the labels' logits are divided by it before an answer is drawn; above 0.
        seed: of the draws.

    Raises:
        ValueError: no samples, or no positive temperature.
    """

    samples: int
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; without samples the best label counts"
            )

    def draw(self, logprobs: Sequence[float], key: str) -> list[int]:
        """Draw labels by ``softmax(logprobs / temperature)``; ``key`` names the question, so that its draws depend on
        nothing that is evaluated beside it."""
        best = max(logprobs)
        weights = [math.exp((logprob - best) / self.temperature) for logprob in logprobs]
        rng = random.Random(f"{self.seed} {key}")
        return rng.choices(range(len(logprobs)), weights, k=self.samples)


def majority(drawn: Sequence[int]) -> int:
    """Return the most frequent label; of equally frequent ones the first that was drawn."""
    return Counter(drawn).most_common(1)[0][0]  # equal counts stay in the order in which they were first seen
