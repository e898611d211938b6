"""Exported models for inference: the base, an adapter's experts and their folds, without PEFT.

`graphmoe_model.exporting.export_for_inference`, or `graphmoe export`, writes what `load_for_inference` reads. Neither
this package nor what it imports needs PEFT.
"""

from graphmoe_inference.folder import ExportedModel, read_export
from graphmoe_inference.layers import LoRALinear, RethinkingMLP, RoutedLinear
from graphmoe_inference.loading import load_for_inference

__all__ = [
    "ExportedModel",
    "LoRALinear",
    "RethinkingMLP",
    "RoutedLinear",
    "load_for_inference",
    "read_export",
]
