"""What a user says of an adapter: `GraphMoEConfig`, the methods and presets it knows, and what it refuses."""

from graphmoe_model.config.graphmoe_config import GraphMoEConfig, GraphMoEPeftType, rank_and_alpha

__all__ = ["GraphMoEConfig", "GraphMoEPeftType", "rank_and_alpha"]
