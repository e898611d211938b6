"""How much memory a GPU needs for a training step: arithmetic for what is held, the model's own code for the rest."""

from graphmoe_model.memory.per_gpu import COMPONENTS, Memory, memory_per_gpu
from graphmoe_tables.strategies import STRATEGIES

__all__ = ["COMPONENTS", "STRATEGIES", "Memory", "memory_per_gpu"]
