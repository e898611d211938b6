"""The configuration of an exported model as vLLM needs it: the base's own, that names our architecture."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from graphmoe_inference.folder import ARCHITECTURE, CONFIG, MODEL_TYPE

# Model type of the base -> vLLM's class. All have `model.layers`, and in a layer `mlp` with `gate_up_proj` and
# `down_proj`, and `self_attn` with `qkv_proj` and `o_proj`.
BASES = {
    "llama": "vllm.model_executor.models.llama:LlamaForCausalLM",
    "mistral": "vllm.model_executor.models.mistral:MistralForCausalLM",
    "phi3": "vllm.model_executor.models.phi3:Phi3ForCausalLM",
    "qwen2": "vllm.model_executor.models.qwen2:Qwen2ForCausalLM",
    "qwen3": "vllm.model_executor.models.qwen3:Qwen3ForCausalLM",
}


class ExportedConfig(PretrainedConfig):
    """Reads ``config.json`` of an exported model; what comes out is of the base's class.

    vLLM asks a configuration for head sizes, rotary embeddings, windows and more, and its processes hand it to each
    other pickled. The base's own class answers all of it and is importable everywhere, so there is no class of ours.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the base's configuration, with our architecture and the adapter's description as ``graphmoe``.

        Args:
            config_dict: of the folder's ``config.json``.
            kwargs: as the base's class takes them.

        Raises:
            ValueError: it is of no exported model, or its base is quantised or of a kind that this plugin does not
                know.
        """
        base, graphmoe = config_dict.get("base_config"), config_dict.get("graphmoe")
        if not isinstance(base, dict) or not isinstance(graphmoe, dict):
            raise ValueError(f"{CONFIG} has no base_config and graphmoe; name a folder that graphmoe export wrote")
        check_base(base)
        own = {**base, "architectures": [ARCHITECTURE], "graphmoe": graphmoe}
        return CONFIG_MAPPING[base["model_type"]].from_dict(own, **kwargs)


def check_base(base: dict[str, Any]) -> None:
    """Check that vLLM can run a base with our layers in it.

    Args:
        base: its configuration.

    Raises:
        ValueError: it is quantised, or of a kind that this plugin does not know.
    """
    kind, named = base.get("model_type"), base.get("architectures") or []
    if kind not in BASES or any(not name.endswith("ForCausalLM") for name in named):
        raise ValueError(
            f"the base is a {named[0] if named else kind} (model type {kind}), and graphmoe_vllm has the causal "
            f"language models of the types {', '.join(sorted(BASES))}; run it by graphmoe_inference.load_for_inference"
        )
    if base.get("quantization_config") or base.get("compression_config"):
        raise ValueError(
            "the base is quantised (quantization_config), and experts need dense weights; export the adapter over the "
            "base that is not quantised"
        )
