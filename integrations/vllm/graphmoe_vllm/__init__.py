"""Exported GraphMoE models in vLLM: ``vllm serve exported``, found by the entry point ``vllm.general_plugins``."""

from graphmoe_inference.folder import ARCHITECTURE, MODEL_TYPE

MODEL = "graphmoe_vllm.model:GraphMoEForCausalLM"


def register() -> None:
    """Tell vLLM of the model type ``graphmoe`` and its architecture.

    vLLM calls it once in each of its processes. The model's module is named, not imported: it loads PyTorch's CUDA
    side, which no process may have done before it forks.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from graphmoe_vllm.config import ExportedConfig

    AutoConfig.register(MODEL_TYPE, ExportedConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
