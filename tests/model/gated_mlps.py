"""The gated MLPs of Transformers, by class: which are supported, and why the others are not."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

# One class for every form that is supported; all other gated MLPs but those below are of the first two.
SUPPORTED = (
    "llama.LlamaMLP",
    "phi3.Phi3MLP",
    "seed_oss.SeedOssMLP",  # a dropout after the down projection
    "lfm2.Lfm2MLP",
    "granitemoehybrid.GraniteMoeHybridMLP",
    "modernbert_decoder.ModernBertDecoderMLP",
    "t5.T5DenseGatedActDense",
    "dinov2.Dinov2SwiGLUFFN",
)
SOMETHING_ELSE, NO_GATE, SUBMODULES = "computes something else than", "is not a gated MLP", "beside its projections"
DROPOUT_INSIDE = r"has a dropout of its own \(.* = 0.1\) that is not one dropout on its output"
# Class -> what the refusal says. Those of `DROPOUT_INSIDE` are supported where that dropout is 0.
REFUSED = {
    "bitnet.BitNetMLP": SUBMODULES,  # a norm before the down projection
    "bloom.BloomMLP": NO_GATE,
    "deepseek_v4.DeepseekV4MLP": SOMETHING_ELSE,  # clamps
    "diffusion_gemma.DiffusionGemmaSelfConditioning": SUBMODULES,  # norms
    "doge.DogeCDMoE": SUBMODULES,  # a router
    "dory.DoryMLP": SUBMODULES,  # since 5.24; multipliers and a norm
    "falcon_h1.FalconH1MLP": SOMETHING_ELSE,  # multipliers
    "gemma3n.Gemma3nAudioConformerFeedForward": NO_GATE,
    "gemma3n.Gemma3nTextMLP": "makes its activations sparse",
    "gemma4.Gemma4VisionMLP": "not a linear layer",  # clips inside its linears
    "glm5_next.Glm5NextTextMLP": SOMETHING_ELSE,  # clamps
    "glm5_next.Glm5NextVisionMLP": SOMETHING_ELSE,  # clamps
    "gte.GteMLP": DROPOUT_INSIDE,
    "inkling.InklingMLP": SOMETHING_ELSE,  # a multiplier
    "kosmos2_5.Kosmos2_5VisionMlp": DROPOUT_INSIDE,
    "kyutai_speech_to_text.KyutaiSpeechToTextGatingMLP": NO_GATE,  # fc1 and fc2, which elsewhere have no gate
    "longt5.LongT5DenseGatedActDense": DROPOUT_INSIDE,
    "minimax_m3_vl.MiniMaxM3VLDenseMLP": NO_GATE,  # clamps
    "modernbert.ModernBertMLP": DROPOUT_INSIDE,
    "modernbert_decoder.ModernBertDecoderMLP": DROPOUT_INSIDE,
    "moonshine.MoonshineDecoderMLP": NO_GATE,  # as Kyutai's, with the gate second
    "moonshine_streaming.MoonshineStreamingDecoderMLP": NO_GATE,
    "moshi.MoshiGatingMLP": NO_GATE,  # as Kyutai's
    "mt5.MT5DenseGatedActDense": DROPOUT_INSIDE,
    "phi4_multimodal.Phi4MultimodalAudioMLP": SUBMODULES,  # a norm, and the gate second
    "pix2struct.Pix2StructTextDenseGatedActDense": DROPOUT_INSIDE,
    "pix2struct.Pix2StructVisionMlp": DROPOUT_INSIDE,
    "pop2piano.Pop2PianoDenseGatedActDense": DROPOUT_INSIDE,
    "rwkv.RwkvFeedForward": NO_GATE,
    "step3p7.Step3p7MLP": SOMETHING_ELSE,  # clamps
    "t5.T5DenseGatedActDense": DROPOUT_INSIDE,
    "t5gemma.T5GemmaMLP": DROPOUT_INSIDE,
    "t5gemma2.T5Gemma2MLP": DROPOUT_INSIDE,
    "timesfm.TimesFmMLP": NO_GATE,  # adds its residual
    "udop.UdopDenseGatedActDense": DROPOUT_INSIDE,
    "umt5.UMT5DenseGatedActDense": DROPOUT_INSIDE,
    "zamba2.Zamba2MLP": SUBMODULES,  # adapters of its own
}
HIDDEN, INTERMEDIATE = 24, 40
# Fields that are lists by layer.
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "gemma3n.Gemma3nTextMLP": {"intermediate_size": [INTERMEDIATE] * 2, "activation_sparsity_pattern": [0.9] * 2},
    "step3p7.Step3p7MLP": {"swiglu_limits_shared": [1.0] * 2, "swiglu_limits": [1.0] * 2},
    "zamba2.Zamba2MLP": {"hybrid_layer_ids": [1]},
}
OWN_ARGUMENTS = {"zamba2.Zamba2MLP": (1, 0)}


class Sizes:
    """A configuration that has every field an MLP may ask for, by the field's name."""

    def __init__(self, dropout: float, own: dict[str, Any]) -> None:
        self.dropout = dropout
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_config"):
            return self
        if name == "use_swiglu_ffn":
            return True
        for pattern, value in (
            ("activation|act_fn|_act$", "silu"),
            ("drop", self.dropout),
            ("bias|^use_", False),
            ("mlp_ratio", 4),
            ("multipliers", [0.5, 0.5]),
            ("multiplier|scale", 0.5),
            ("limit|alpha", 1.0),
            ("intermediate|inner|_ff$|ffn", INTERMEDIATE),
            ("hidden|dim|d_model|output", HIDDEN),
        ):
            if re.search(pattern, name):
                return value
        return 1


def build(name: str, dropout: float = 0.0) -> nn.Module:
    """The MLP of a class ``family.Class`` at small sizes, with random weights; skips where Transformers lacks it."""
    family, kind = name.split(".")
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}", exc_type=ImportError)
    if not hasattr(module, kind):
        pytest.skip(f"no {name} in Transformers {transformers.__version__}")
    arguments = []
    for parameter in list(inspect.signature(getattr(module, kind).__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is not parameter.empty:
            break
        sizes = Sizes(dropout, OWN_FIELDS.get(name, {}))
        arguments.append(sizes if parameter.name == "config" else getattr(sizes, parameter.name))
    mlp = getattr(module, kind)(*arguments, *OWN_ARGUMENTS.get(name, ()))
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(std=0.2)
    return mlp


OTHER_THINGS = re.compile(
    r"Attention|Gated(Residual|Delta)|SelfOutput|Projection|Update|Head|For[A-Z]|Upsampling|Module$"
)
MLP_NAME = re.compile(r"MLP|Mlp|FFN|GLU|GatedAct|FeedForward|Conditioning|CDMoE")


def classes() -> Iterator[str]:
    """Every class of the installed Transformers that looks like an MLP in which something is multiplied."""
    folder = Path(importlib.import_module("transformers.models").__file__).parent
    for file in sorted(folder.glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ClassDef) or not MLP_NAME.search(node.name) or OTHER_THINGS.search(node.name):
                continue
            methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
            if not {"__init__", "forward"} <= methods.keys() or "Linear" not in ast.unparse(methods["__init__"]):
                continue
            if _gates(methods["forward"]):
                yield f"{file.parent.name}.{node.name}"


def _gates(forward: ast.FunctionDef) -> bool:
    multiplied = any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult) for n in ast.walk(forward))
    return multiplied and re.search(r"act|silu|gelu|sigmoid|relu", ast.unparse(forward)) is not None
