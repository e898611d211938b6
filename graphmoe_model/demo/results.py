"""What the demo found, as its report and its plots read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from graphmoe_model.demo.comparison import Comparison
from graphmoe_model.demo.latency import RoundLatency


@dataclass(frozen=True)
class DemoResults:
    """Everything the report says.

    Attributes:
        conditions: what the figures depend on (torch version, threads, date ...), by name.
        base_parameters: of the frozen base model.
        parameters: trainable parameters by component.
        accuracy_before, accuracy_after: share of right answers, 0..1, by skill, on held-out questions.
        questions: how many held-out questions there are over all skills.
        losses: (step, training loss).
        expert_load: layer name -> [T, n], the share of tokens each expert gets in each round; rows sum to 1.
        latency_conditions: of what, on what, the latencies were measured.
        examples: (prompt, right answer, answer before, answer after).
        reload_difference: the largest difference of a logit after saving and loading.
        seconds: wall time by stage.
        comparison: of all methods, or None where it was left out.
    """

    seed: int
    conditions: dict[str, str]
    base_parameters: int
    parameters: dict[str, int]
    accuracy_before: dict[str, float]
    accuracy_after: dict[str, float]
    questions: int
    losses: list[tuple[int, float]]
    expert_load: dict[str, Tensor]
    latency: list[RoundLatency]
    latency_conditions: str
    examples: list[tuple[str, str, str, str]]
    reload_difference: float
    seconds: dict[str, float]
    comparison: Comparison | None
