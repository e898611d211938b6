"""Makes GraphMoE known to PEFT, whose own registration accepts no name from outside."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, mapping
from transformers.integrations.peft import PeftAdapterMixin

from graphmoe_model.checkpoints import (
    checked_from_pretrained,
    checked_load,
    checked_transformers_load,
    save_whole,
)
from graphmoe_model.config import GraphMoEConfig, GraphMoEPeftType
from graphmoe_model.offloaded_loading import (
    into_offloaded_model,
    into_offloaded_transformers_model,
    onto_offloaded_base,
)
from graphmoe_model.peft_helpers import extend_peft_helpers
from graphmoe_model.tuner import GraphMoEModel


def register() -> None:
    """Enter the method into PEFT's mappings, which ``get_peft_model`` and every loader look up.

    PEFT chooses the class of model by task, not by method, so there is no class of ours whose ``save_pretrained`` and
    loaders could be overridden: PEFT's own and Transformers' are wrapped, and act differently for GraphMoE only.
    """
    method: Any = GraphMoEPeftType.GRAPHMOE
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method] = GraphMoEConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[method] = GraphMoEModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[method] = GraphMoEModel.prefix
    extend_peft_helpers()
    PeftModel.save_pretrained = save_whole(PeftModel.save_pretrained)  # type: ignore[method-assign]
    PeftModel.load_adapter = checked_load(into_offloaded_model(PeftModel.load_adapter))  # type: ignore[method-assign]
    from_pretrained = onto_offloaded_base(vars(PeftModel)["from_pretrained"])
    PeftModel.from_pretrained = checked_from_pretrained(from_pretrained)  # type: ignore[method-assign]
    mixin: Any = PeftAdapterMixin
    mixin.load_adapter = checked_transformers_load(into_offloaded_transformers_model(mixin.load_adapter))
