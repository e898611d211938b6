"""Makes GraphMoE known to PEFT, whose own registration accepts no name from outside."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from graphmoe_model.config import GraphMoEConfig, GraphMoEPeftType
from graphmoe_model.tuner import GraphMoEModel


def register() -> None:
    """Enter the method into PEFT's mappings, which ``get_peft_model`` and every loader look up."""
    PEFT_TYPE_TO_CONFIG_MAPPING[GraphMoEPeftType.GRAPHMOE] = GraphMoEConfig
    PEFT_TYPE_TO_TUNER_MAPPING[GraphMoEPeftType.GRAPHMOE] = GraphMoEModel
    PEFT_TYPE_TO_PREFIX_MAPPING[GraphMoEPeftType.GRAPHMOE] = GraphMoEModel.prefix
