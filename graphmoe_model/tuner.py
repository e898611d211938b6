"""GraphMoE as a PEFT method: routed experts with rethinking on the MLPs, plain LoRA on the attention projections."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.other import get_pattern_key
from torch import nn

from graphmoe_model.attention import find_targets
from graphmoe_model.base_mlp import is_gated_mlp
from graphmoe_model.config import GraphMoEConfig
from graphmoe_model.ffn import FusedGraphMoEFFN


class GraphMoEModel(LoraModel):
    """The tuner behind ``get_peft_model(model, GraphMoEConfig(...))``."""

    tuner_layer_cls = (LoraLayer, FusedGraphMoEFFN)

    def _prepare_adapter_config(
        self, peft_config: GraphMoEConfig, model_config: dict[str, Any]
    ) -> GraphMoEConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = find_targets(self.model)
        return peft_config

    def _create_and_replace(
        self,
        lora_config: GraphMoEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if not isinstance(target, FusedGraphMoEFFN) and not is_gated_mlp(target):
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
            )
            return
        r = lora_config.rank_pattern.get(
            get_pattern_key(lora_config.rank_pattern, current_key), lora_config.r
        )
        alpha = lora_config.alpha_pattern.get(
            get_pattern_key(lora_config.alpha_pattern, current_key), lora_config.lora_alpha
        )
        if isinstance(target, FusedGraphMoEFFN):
            target.update_layer(adapter_name, lora_config, r=r, lora_alpha=alpha)
            return
        ffn = FusedGraphMoEFFN(target, lora_config, adapter_name, r=r, lora_alpha=alpha)
        if adapter_name not in self.active_adapters:
            ffn.requires_grad_(False)  # a further adapter is not trainable until it is made active
        self._replace_module(parent, target_name, ffn, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The adapter's name stands right behind its container, where every PEFT loader puts it back."""
        container = f".lora_graphmoe.{adapter_name}."
        if container in key:
            return key.replace(container, ".lora_graphmoe.")
        return super()._remove_adapter_name_from_key(key, adapter_name)
