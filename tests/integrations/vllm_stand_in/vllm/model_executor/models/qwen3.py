"""The class of this family."""

from .llama import LlamaForCausalLM as Qwen3ForCausalLM

__all__ = ["Qwen3ForCausalLM"]
