"""What others compute: MixLoRA as published, plain LoRA by PEFT, Liger-Kernel's MLP.

All of them read the tensors that the other providers read; nothing is copied and no module of theirs is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.plain import Forward, rounds_of, route
from graphmoe_kernels import DenseMLP, LayerWeights, RethinkingSpec, get_activation

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def peer_mixlora(weights: LayerWeights, spec: RethinkingSpec) -> Forward:
    """MixLoRA as published, once per round, as x [N, D] -> y_T [N, D]; the GRU joins the rounds.

    Base gate and up are computed once for all experts; then a Python loop over the experts, each of which finds its
    tokens by ``torch.where`` and runs the base's down projection on them (MixLoRA, arXiv 2404.15159, section 3).
    """
    base, lora, activation = weights.base.dense(), weights.experts.lora, get_activation(spec.activation).function

    def layer(x: Tensor) -> Tensor:
        mixing, chosen = route(x, weights, spec)  # [N, k] each
        chosen_by = F.one_hot(chosen, len(lora.gate_A)).permute(2, 1, 0)  # [n, k, N]
        gate, up = base.project_in(x)  # [N, F] each
        outputs = []
        # Taken apart once: the gradient of `tensor[i]` would be as large as the stack of all experts, n times.
        for i, pairs in enumerate(zip(*(t.unbind() for t in lora.pairs), strict=True)):
            gate_A, gate_B, up_A, up_B, down_A, down_B = pairs
            _, tokens = torch.where(chosen_by[i])  # [m]
            read = x[tokens]
            g = gate[tokens] + spec.scale * F.linear(F.linear(read, gate_A), gate_B)
            u = up[tokens] + spec.scale * F.linear(F.linear(read, up_A), up_B)
            hidden = activation(g) * u  # [m, F]
            outputs.append(base.project_out(hidden) + spec.scale * F.linear(F.linear(hidden, down_A), down_B))
        y = torch.zeros_like(x)
        for i, output in enumerate(outputs):
            slots, tokens = torch.where(chosen_by[i])  # once more, as the published code does
            y.index_add_(0, tokens, output * mixing[tokens, slots, None])
        return y

    return rounds_of(layer, weights.gru, spec)


def peft_lora(mlp: nn.Module, rank: int, alpha: float, seed: int) -> nn.Module:
    """The MLP with PEFT's LoRA on its three linears: one adapter instead of n experts, no router, one round.

    A [r, in] and B [out, r] are drawn by PEFT from ``seed``, B too, so that every term counts; both have the MLP's
    dtype. There is no dropout. The MLP is not changed, its memory shared; trainable are the tensors of `lora_tensors`.

    Raises:
        TypeError: ``mlp`` is no LlamaMLP.
    """
    number: Any = alpha  # PEFT declares an int and takes any number
    settings: dict[str, Any] = {"lora_dropout": 0.0, "target_modules": list(PROJECTIONS), "init_lora_weights": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=number, **settings), _sharing(LlamaMLP, mlp))


def lora_tensors(lora: nn.Module) -> dict[str, Tensor]:
    """The trainable tensors of `peft_lora`'s module: gate_A, gate_B, up_A, up_B, down_A, down_B, by name."""
    found = {}
    for name in PROJECTIONS:
        linear: Any = getattr(lora, name)
        short = name.removesuffix("_proj")
        found[f"{short}_A"] = linear.lora_A["default"].weight  # [r, in]
        found[f"{short}_B"] = linear.lora_B["default"].weight  # [out, r]
    return found


def peft_lora_reference(x: Tensor, base: DenseMLP, lora: Mapping[str, Tensor], scale: float) -> Tensor:
    """What `peft_lora`'s module has to equal: W x + s B A x in each linear of a SwiGLU MLP.

    x and y are [N, D]; ``lora`` has the names of `lora_tensors`; ``scale`` is s = alpha / r. It computes in the dtype
    of its arguments: fp64 ones make it the oracle.
    """

    def adapted(x: Tensor, name: str) -> Tensor:
        return x @ getattr(base, name).T + scale * (x @ lora[f"{name}_A"].T) @ lora[f"{name}_B"].T

    gate = adapted(x, "gate")
    return adapted(gate * torch.sigmoid(gate) * adapted(x, "up"), "down")


def liger_mlp(mlp: nn.Module) -> nn.Module:
    """Liger-Kernel's ``LigerSwiGLUMLP`` over the MLP's frozen weights, whose memory it shares.

    Its backward overwrites what its forward saved, so a graph gives right gradients once.

    Raises:
        TypeError: ``mlp`` is no LlamaMLP.
    """
    return _sharing(importlib.import_module("liger_kernel.transformers").LigerSwiGLUMLP, mlp)


def liger_missing(device: torch.device) -> str | None:
    """Why `liger_mlp` cannot be used on a device, or None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed (pip install liger-kernel)"
    try:
        importlib.import_module("liger_kernel.transformers")
    except Exception as error:  # whatever it raises, an assert on a version among them, is the reason
        return f"liger_kernel cannot be imported: {type(error).__name__}: {error}"
    return None if device.type == "cuda" else f"Liger-Kernel runs on CUDA devices, this is {device}"


def _sharing(kind: Any, mlp: nn.Module) -> nn.Module:
    """A new MLP of class ``kind`` whose parameters are frozen and share the memory of ``mlp``'s."""
    if not isinstance(mlp, LlamaMLP):
        raise TypeError(f"the peers are built from a transformers LlamaMLP, got {type(mlp).__name__}")
    with torch.device("meta"):
        twin = kind(mlp.config)
    for name in PROJECTIONS:
        getattr(twin, name).weight = nn.Parameter(getattr(mlp, name).weight.detach(), requires_grad=False)
    return twin
