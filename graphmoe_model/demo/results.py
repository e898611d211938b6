"""What the demo found, as its report and its plots read it, and whether that is as it should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from graphmoe_model.demo.comparison import Comparison, failed_methods
from graphmoe_model.demo.latency import RoundLatency

GOAL = 0.9


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
        expert_load: layer name -> [T, n], the share of tokens each expert got in each round, over the last logged steps
            of training; rows sum to 1.
        latency_conditions: of what, on what, the latencies were measured.
        examples: (prompt, right answer, answer before, answer after).
        reload_difference: the largest difference of a label's log-probability after saving and loading.
        seconds: wall time by stage.
        comparison: of all methods, or None where it was left out.
        folder: where base model, questions and adapter were left.
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
    folder: Path


def failures(results: DemoResults, *, learnt: bool) -> list[str]:
    """Return a sentence for everything that is not as it should be; accuracies count only if the run was long enough,
    ``learnt``."""
    found = []
    if results.reload_difference != 0:
        found.append(f"The reloaded adapter differs by {results.reload_difference:.2e}; it should not.")
    reached = fmean(results.accuracy_after.values())
    if learnt and reached < GOAL:
        found.append(f"Accuracy {reached:.1%} is below the {GOAL:.0%} that this demo should reach.")
    if results.comparison is not None:
        found += failed_methods(results.comparison, learnt=learnt)
    return found
