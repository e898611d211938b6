"""Models for inference without PEFT: base and adapter in one folder."""

from graphmoe_model.exporting.export import export_for_inference

__all__ = ["export_for_inference"]
