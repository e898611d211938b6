"""Decoders with fused projections on the tokens of a batch, laid end to end [N, D]; all bases are one class here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from ...forward_context import get_forward_context

STACKED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
STACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}


class FusedLinear(nn.Module):
    """Returns its output and a bias that it left out, which is none; its weight goes once it is loaded, as on CPUs."""

    def __init__(self, inside: int, outside: list[int], bias: bool) -> None:
        super().__init__()
        self.outside = outside
        self.weight = nn.Parameter(torch.full((sum(outside), inside), float("nan")), requires_grad=False)
        own = nn.Parameter(torch.full((sum(outside),), float("nan")), requires_grad=False) if bias else None
        self.register_parameter("bias", own)
        self.packed: Any = None

    def process_weights_after_loading(self) -> None:
        self.packed = self.weight.data.clone()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.packed, self.bias), None


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_up_proj = FusedLinear(config.hidden_size, [config.intermediate_size] * 2, bias)
        self.down_proj = FusedLinear(config.intermediate_size, [config.hidden_size], bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)[0]


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.q_size = config.num_attention_heads * self.head_dim
        self.kv_size = config.num_key_value_heads * self.head_dim
        bias = getattr(config, "attention_bias", config.model_type == "qwen2")
        self.qkv_proj = FusedLinear(config.hidden_size, [self.q_size, self.kv_size, self.kv_size], bias)
        self.o_proj = FusedLinear(self.q_size, [config.hidden_size], bias and config.model_type != "qwen2")
        self.rotary_emb = LlamaRotaryEmbedding(config)
        if config.model_type == "qwen3":
            self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k, v = (t.view(len(x), -1, self.head_dim) for t in (q, k, v))  # [N, heads, head_dim]
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.rotary_emb(x, positions[None])
        q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        v = v.transpose(0, 1)[None]
        lengths = get_forward_context().lengths
        parts = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
        out = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        return self.o_proj(torch.cat(out, dim=2)[0].transpose(0, 1).reshape(len(x), -1))[0]


class DecoderLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        x = x + self.self_attn(positions, self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaForCausalLM(nn.Module):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Any, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.model.layers:
            x = layer(positions, x)
        return self.model.norm(x)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        own = dict(self.named_parameters())
        for name, tensor in weights:
            path, linear, last = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.split("."))
            rows = slice(None)
            if linear in STACKED:
                linear, place = STACKED[linear]
                outside = self.get_submodule(f"{path}.{linear}").outside
                rows = slice(sum(outside[:place]), sum(outside[: place + 1]))
            target = ".".join(part for part in (path, linear, last) if part)
            if target not in own:
                raise ValueError(f"There is no module or parameter named {target!r}")
            own[target][rows].copy_(tensor)
            loaded.add(target)
        return loaded
