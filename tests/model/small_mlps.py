"""MLPs of several models, small, and layers over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig, Phi3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig

D, F, EXPERTS, RANK = 24, 40, 4, 3
SIZES = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 1}


def llama_mlp(bias: bool = False, activation: str = "silu") -> nn.Module:
    """Llama's MLP, with biases on request."""
    return LlamaMLP(LlamaConfig(**SIZES, mlp_bias=bias, hidden_act=activation))


MLPS = {
    "llama": llama_mlp,
    "llama with biases": lambda: llama_mlp(bias=True),
    "phi3, fused gate and up": lambda: Phi3MLP(Phi3Config(**SIZES, pad_token_id=0)),
    "gemma, gelu_tanh": lambda: GemmaMLP(GemmaConfig(**SIZES, hidden_activation="gelu_pytorch_tanh")),
}


def config(**options) -> GraphMoEConfig:
    """A small config; ``init_lora_weights=False`` unless asked for, so that every term counts."""
    defaults = {"r": RANK, "lora_alpha": 6, "num_experts": EXPERTS, "top_k": 2, "lora_dropout": 0.0}
    return GraphMoEConfig(**(defaults | {"gru_hidden_scale": 0.3, "init_lora_weights": False} | options))


def ffn(mlp: nn.Module | None = None, dtype: torch.dtype = torch.float64, **options) -> FusedGraphMoEFFN:
    """A layer over an MLP (Llama's by default), in training mode."""
    return FusedGraphMoEFFN((mlp or llama_mlp()).to(dtype), config(**options))


def hidden_states(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random x of the MLPs' width."""
    return torch.randn(*(shape or (2, 5)), D, dtype=torch.float64).to(dtype)
