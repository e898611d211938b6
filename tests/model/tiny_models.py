"""Tiny random models of every architecture that the tests use, and adapters small enough for them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graphmoe_model import GraphMoEConfig

VOCABULARY = 64
PADDING = 0

# model_type -> what it needs besides the common sizes
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "glm4": {"head_dim": 8},
    "smollm3": {},
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.1, "attention_dropout": 0.0},
    "lfm2": {"layer_types": ["full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "modernbert-decoder": {"layer_types": ["full_attention"] * 2, "cls_token_id": 1, "sep_token_id": 2},
}


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A causal language model of two layers with random weights, in evaluation mode.

    Its weights are large enough that logits differ by far more than rounding, and the output embedding is not the
    input's, which at this size would have every model repeat its last token.
    """
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": PADDING,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **{**sizes, **ARCHITECTURES.get(model_type, {}), **overrides})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_config(**overrides: Any) -> GraphMoEConfig:
    """A `GraphMoEConfig` for `tiny_model`: rank 4, four experts, three rounds, no dropout."""
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "num_experts": 4,
        "gru_hidden_scale": 0.25,
    }
    return GraphMoEConfig(**{**settings, **overrides})


def tiny_peft_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PeftModel:
    """`tiny_model` with an adapter made from `tiny_config`, whose tensors are random but for what starts at zero."""
    return get_peft_model(tiny_model(model_type, seed=seed), tiny_config(**overrides))


def tokens(batch: int = 2, length: int = 7, *, seed: int = 0) -> Tensor:
    """Random token ids [batch, length] without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: Tensor | None = None) -> Tensor:
    """The model's logits for `tokens` (or other ones), in evaluation mode and without a gradient."""
    return model.eval()(input_ids=tokens() if input_ids is None else input_ids).logits


def train_step(model: torch.nn.Module, *, lr: float = 0.05, input_ids: Tensor | None = None) -> float:
    """One step of AdamW on the trainable parameters; the loss before it."""
    ids = tokens() if input_ids is None else input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
