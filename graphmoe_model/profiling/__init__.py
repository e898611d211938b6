"""Where a model's time goes: attention, MLP, experts, routing and GRU, by `torch.profiler` with named ranges.

`models` and `modules` make ready what is profiled, `measure` runs it, `attribution` reads the trace into a `result`;
`report` and `plot` write it, for ``graphmoe profile``.
"""

from graphmoe_model.profiling.measure import PHASES, profile_model
from graphmoe_model.profiling.result import CATEGORIES, Profile

__all__ = ["CATEGORIES", "PHASES", "Profile", "profile_model"]
