"""The class of this family."""

from .llama import LlamaForCausalLM as Qwen2ForCausalLM

__all__ = ["Qwen2ForCausalLM"]
