"""The GraphMoE layer, its configuration, and the method as PEFT knows it."""

from graphmoe_model.config import GraphMoEConfig, GraphMoEPeftType
from graphmoe_model.ffn import FusedGraphMoEFFN

__all__ = ["FusedGraphMoEFFN", "GraphMoEConfig", "GraphMoEPeftType"]
