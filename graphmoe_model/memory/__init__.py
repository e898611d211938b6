"""How much memory a GPU needs for a training step: arithmetic for what is held, the model's own code for the rest.

`strategies` says what each process holds of the `parameter_counts`; `activations` runs a step of the model on tensors
without memory under `live_bytes`; `per_gpu` adds them up, for ``graphmoe memory``.
"""

from graphmoe_model.memory.per_gpu import COMPONENTS, Memory, memory_per_gpu
from graphmoe_tables.strategies import STRATEGIES

__all__ = ["COMPONENTS", "STRATEGIES", "Memory", "memory_per_gpu"]
