"""The class of this family."""

from .llama import LlamaForCausalLM as MistralForCausalLM

__all__ = ["MistralForCausalLM"]
