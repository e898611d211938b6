"""The method as PEFT knows it: which modules of a model get adapters, and how adapters come and go.

`GraphMoEModel` is the tuner. Before it changes anything, `targets`, `selection`, `saved_modules` and `adapter_names`
refuse what cannot be attached; `peft_helpers` are PEFT's helpers for LoRA, on models with experts.
"""

from graphmoe_model.tuner.decoder_layers import (
    ATTENTION_OUTPUT,
    QUERY_KEY_VALUE,
    DecoderLayer,
    decoder_layers,
    is_attention,
)
from graphmoe_model.tuner.model import GraphMoEModel
from graphmoe_model.tuner.peft_helpers import create_loraplus_optimizer, extend_peft_helpers
from graphmoe_model.tuner.targets import check_targets

__all__ = [
    "ATTENTION_OUTPUT",
    "QUERY_KEY_VALUE",
    "DecoderLayer",
    "GraphMoEModel",
    "check_targets",
    "create_loraplus_optimizer",
    "decoder_layers",
    "extend_peft_helpers",
    "is_attention",
]
