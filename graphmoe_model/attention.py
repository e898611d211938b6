"""What GraphMoE adapts in a model, found from its modules: attention projections and gated MLPs of decoder layers."""

from __future__ import annotations

from torch import nn

from graphmoe_model.base_mlp import is_gated_mlp
from graphmoe_model.ffn import FusedGraphMoEFFN

ATTENTION_PROJECTIONS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "dense"}
)


def find_targets(model: nn.Module) -> set[str]:
    """Suffixes of the attention projections and MLPs of the decoder layers."""
    targets = set()
    for _, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        for layer in layers:
            for name, child in layer.named_children():
                if is_gated_mlp(child) or isinstance(child, FusedGraphMoEFFN):
                    targets.add(name)
                targets |= {n for n, _ in child.named_children() if n in ATTENTION_PROJECTIONS}
    return targets
