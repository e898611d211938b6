"""Frozen bases of every quantisation that docs/quantised.md lists: single linears, MLPs, and models from a folder."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from tests.model.tiny_models import tiny_model

bnb = pytest.importorskip("bitsandbytes", reason="pip install 'graphmoe[quant]'")
torchao = pytest.importorskip("torchao.quantization", reason="pip install 'graphmoe[quant]'")

HIDDEN, INTERMEDIATE = 64, 96  # a block of 64 numbers may lie in two rows of the down projection
GROUP = 32


def _with_weight_of(quantised: nn.Module, linear: nn.Linear) -> nn.Module:
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")  # which is what quantises


def four_bits(linear: nn.Linear, **options: Any) -> nn.Module:
    """bitsandbytes' linear of 4 bits, computing in fp32."""
    settings = {"compute_dtype": torch.float32, "compress_statistics": False, "quant_type": "nf4", **options}
    return _with_weight_of(
        bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, **settings), linear
    )


def eight_bits(linear: nn.Linear, threshold: float = 0.0) -> nn.Module:
    """bitsandbytes' linear of 8 bits. In evaluation it rounds its input's columns below ``threshold``, or all at 0."""
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    return _with_weight_of(bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold), linear)


def by_torchao(linear: nn.Linear, config: Any) -> nn.Module:
    holder = nn.Sequential(copy.deepcopy(linear))
    torchao.quantize_(holder, config)
    return holder[0]


def by_hqq(linear: nn.Linear) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize", reason="pip install hqq")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return quantize.HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu", del_orig=False)


INTX = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(GROUP))
DYNAMIC = torchao.Int8DynamicActivationInt8WeightConfig()

# How each makes a linear. "int8, exact" is int8 with every column above the threshold, so that no input is rounded.
LINEARS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": four_bits,
    "fp4": functools.partial(four_bits, quant_type="fp4"),
    "nf4 double": functools.partial(four_bits, compress_statistics=True),
    "nf4 in bf16 storage": functools.partial(four_bits, quant_storage=torch.bfloat16),
    "int8": eight_bits,
    "int8, exact": functools.partial(eight_bits, threshold=1e-6),
    "torchao int8": lambda linear: by_torchao(linear, torchao.Int8WeightOnlyConfig()),
    "torchao fp8": lambda linear: by_torchao(linear, torchao.Float8WeightOnlyConfig()),
    "torchao intx": lambda linear: by_torchao(linear, INTX),
    "hqq": by_hqq,
}
# Those that compute with their dense weight in evaluation too.
EXACT = [name for name in LINEARS if name != "int8"]


def plain_linear(out_features: int = INTERMEDIATE, bias: bool = False) -> nn.Linear:
    return nn.Linear(HIDDEN, out_features, bias=bias).requires_grad_(False)


def plain_mlp(bias: bool = False, fused: bool = False, intermediate: int = INTERMEDIATE) -> nn.Module:
    """Llama's MLP, or Phi-3's with gate and up in one linear."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": intermediate, "num_attention_heads": 1}
    mlp = Phi3MLP(Phi3Config(**sizes, pad_token_id=0)) if fused else LlamaMLP(LlamaConfig(**sizes, mlp_bias=bias))
    return mlp.requires_grad_(False)


def _replaced(mlp: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for name, linear in list(mlp.named_children()):
        if hasattr(linear, "in_features"):
            setattr(mlp, name, make(linear))
    return mlp


def quantised_mlp(kind: str, **options: Any) -> nn.Module:
    """An MLP whose three (or two) linears are all of a kind."""
    return _replaced(plain_mlp(**options), LINEARS[kind])


@torch.no_grad()
def dense_linear(linear: nn.Module) -> nn.Linear:
    """The plain linear that computes what a quantised one does: its columns are what the unit vectors give."""
    dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None).requires_grad_(False)
    trained = copy.deepcopy(linear).train()  # in which 8-bit linears do not round their input on a CPU
    zero = trained(torch.zeros(1, linear.in_features))
    dense.weight.copy_((trained(torch.eye(linear.in_features)) - zero).T)
    if linear.bias is not None:
        dense.bias.copy_(zero[0])
    return dense


def dense_twin(mlp: nn.Module) -> nn.Module:
    """The plain MLP that computes what a quantised one does."""
    twin = copy.deepcopy(mlp)
    return _replaced(twin, dense_linear)


def hidden_states(count: int = 11) -> Tensor:
    return torch.randn(count, HIDDEN)


def _four(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **{"bnb_4bit_quant_type": "nf4", **options}
    )


# As Transformers is asked for them.
MODELS: dict[str, Callable[[], Any]] = {
    "nf4": _four,
    "fp4": lambda: _four(bnb_4bit_quant_type="fp4"),
    "nf4 double": lambda: _four(bnb_4bit_use_double_quant=True),
    "nf4 in bf16 storage": lambda: _four(bnb_4bit_quant_storage=torch.bfloat16),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao fp8": lambda: TorchAoConfig(torchao.Float8WeightOnlyConfig()),
    "torchao intx": lambda: TorchAoConfig(INTX),
    "torchao int8 dynamic": lambda: TorchAoConfig(DYNAMIC),
}


def save_model(folder: Path) -> Path:
    """Write the tiny Llama that the tests load quantised."""
    tiny_model(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE).save_pretrained(folder)
    return folder


def load_model(folder: Path, kind: str) -> PreTrainedModel:
    """The model of a folder, quantised while it is loaded."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=MODELS[kind](), dtype=torch.float32, device_map="cpu"
    ).eval()
