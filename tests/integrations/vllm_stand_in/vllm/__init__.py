"""A stand-in for what the plugin meets in vLLM 0.33.0: its plugins, its registry, its loader and its models' forward.

It is written from how those behave, for one process on a CPU: no scheduler, no cache of keys and values, no sampling,
no compiled graphs. What rests on these is not tested by it.
"""

from .model_executor.models.registry import ModelRegistry

__all__ = ["ModelRegistry"]
__version__ = "0.33.0+stand.in"
