"""Adapters from one format to another: as GraphMoE, MoE-PEFT and PEFT save them. No base model is needed.

An `Adapter` is a configuration and tensors, as they stand in a folder (`adapter`, `files`). `import_moe_peft` and
`import_lora` read the others' formats into one, `exports` writes them, and `refusals` says what a format cannot hold.
`layout` has every tensor of a module, `peer_layers` and `peer_config` what MoE-PEFT's files have in their place, and
`loadable` tells whether PEFT would find the modules again.
"""

from graphmoe_model.conversion.adapter import Adapter, read_adapter, write_adapter
from graphmoe_model.conversion.exports import attention_lora, to_moe_peft, to_peft
from graphmoe_model.conversion.import_moe_peft import from_moe_peft
from graphmoe_model.conversion.rounds import with_rounds

__all__ = [
    "Adapter",
    "attention_lora",
    "from_moe_peft",
    "read_adapter",
    "to_moe_peft",
    "to_peft",
    "with_rounds",
    "write_adapter",
]
