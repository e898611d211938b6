"""A tiny Llama as a real GGUF file: quantised tensors, llama.cpp's order of the query and key rows, a byte-level BPE
tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.model.tiny_models import tiny_model

FILE = "tiny.gguf"
BLOCK = 32  # values of a row that share a scale, in each of these formats
# What each tensor is stored as, and the bits per value; every other tensor is stored in fp32.
FORMATS = {
    "attn_q": (Format.Q8_0, 8),
    "attn_k": (Format.Q8_0, 8),
    "attn_v": (Format.Q5_1, 5),
    "attn_output": (Format.Q4_1, 4),
    "ffn_gate": (Format.Q4_1, 4),
    "ffn_up": (Format.Q4_0, 4),
    "ffn_down": (Format.Q5_0, 5),
    "output": (Format.Q8_0, 8),
}


def llama_for(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of two layers with fewer key heads than query heads, whose norms differ from each other."""
    sizes = {"intermediate_size": 64, "max_position_embeddings": 512, "initializer_range": 0.3}
    model = tiny_model("llama", vocab_size=len(tokenizer), **sizes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tensor_name(name: str) -> str:
    """Return what GGUF calls a parameter of `llama_for`, without its block: 'attn_q', 'output_norm'."""
    found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(name, try_suffixes=(".weight",))
    return found.removesuffix(".weight").split(".")[-1]


def write_gguf(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, adds_first: bool | None = False
) -> LlamaForCausalLM:
    """Write model and tokenizer to ``folder / FILE``.

    ``adds_first`` is what the file says of the token that begins a text: whether one does, or nothing.

    Returns:
        The model that the file holds: that model after quantisation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    _add_config(writer, model)
    _add_tokenizer(writer, tokenizer, adds_first)
    held = copy.deepcopy(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in held.named_parameters():
            own = tensor_name(name)
            heads = {
                "attn_q": model.config.num_attention_heads,
                "attn_k": model.config.num_key_value_heads,
            }.get(own)
            rows = parameter if heads is None else _interleaved(parameter, heads)
            stored, kind = rows.numpy(), Format.F32
            if own in FORMATS:
                kind = FORMATS[own][0]
                stored = gguf.quantize(stored, kind)
                # rows are quantised one by one, so those in their first order hold the same values
                parameter.copy_(_values(gguf.quantize(parameter.numpy(), kind), kind))
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _add_config(writer: gguf.GGUFWriter, model: LlamaForCausalLM) -> None:
    config = model.config
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, adds_first: bool | None) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token in special] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if adds_first is not None:
        writer.add_add_bos_token(adds_first)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows in the order of llama.cpp, whose rotary embedding turns neighbours where Transformers' turns halves."""
    halves = weight.view(heads, 2, -1, weight.shape[1])  # [heads, 2, head_dim / 2, in_features]
    return halves.transpose(1, 2).reshape(weight.shape)


def _values(stored: np.ndarray, kind: Format) -> Tensor:
    return torch.from_numpy(gguf.dequantize(stored, kind))
