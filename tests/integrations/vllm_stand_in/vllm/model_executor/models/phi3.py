"""The class of this family."""

from .llama import LlamaForCausalLM as Phi3ForCausalLM

__all__ = ["Phi3ForCausalLM"]
