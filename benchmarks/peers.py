"""What others compute: MixLoRA as published and as its package runs it, plain LoRA by PEFT, Liger-Kernel's MLP.

All of them read the tensors that the other providers read; nothing is copied and no module of theirs is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.plain import Forward, rounds_of, route
from graphmoe_kernels import ChosenExperts, DenseMLP, LayerWeights, RethinkingSpec, get_activation

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def peer_mixlora(weights: LayerWeights, spec: RethinkingSpec) -> Forward:
    """MixLoRA as published, once per round, as x [N, D] -> y_T [N, D]; the GRU joins the rounds.

    Base gate and up are computed once for all experts; then a Python loop over the experts, each of which finds its
    tokens by ``torch.where`` and runs the base's down projection on them (MixLoRA, arXiv 2404.15159, section 3). It is
    the arithmetic of `mixlora_package` without what that package's modules add to it.

    Raises:
        ValueError: unnormalised routing weights or dropout are asked for; several rounds without a GRU.
    """
    _check(weights, spec)
    base = weights.base.dense()
    return rounds_of(lambda x: _mixlora(x, base, weights, spec), weights.gru, spec)


def _check(weights: LayerWeights, spec: RethinkingSpec) -> None:
    if not spec.normalize:
        raise ValueError("MixLoRA divides the chosen routing weights by their sum; use a spec with normalize=True")
    if spec.dropout:
        raise ValueError(f"the peers are compared without dropout, got {spec.dropout}; use a spec with dropout=0")
    if spec.rounds > 1 and weights.gru is None:
        raise ValueError(f"{spec.rounds} rounds need a GRU to join them, but weights.gru is None")


def _mixlora(x: Tensor, base: DenseMLP, weights: LayerWeights, spec: RethinkingSpec) -> Tensor:
    """y [N, D] of one round."""
    activation = get_activation(spec.activation).function
    mixing, chosen = route(x, weights, spec)  # [N, k] each
    chosen_by = F.one_hot(chosen, len(weights.experts.lora.gate_A)).permute(2, 1, 0)  # [n, k, N]
    gate, up = base.project_in(x)  # [N, F] each
    outputs = []
    # Taken apart once: the gradient of `tensor[i]` would be as large as the stack of all experts, n times.
    for i, pairs in enumerate(zip(*(t.unbind() for t in weights.experts.lora.pairs), strict=True)):
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


def mixlora_package(mlp: nn.Module, weights: LayerWeights, spec: RethinkingSpec) -> Forward:
    """The ``mixlora`` package's own layer, once per round; rounds are joined as in `peer_mixlora`.

    Its LoRA dtype is the weights', as ``from_pretrained(torch_dtype=...)`` sets it; in that dtype it also routes, so
    below fp32 tokens near a tie choose other experts. Arguments, result and errors are those of `peer_mixlora`;
    ``mlp`` is the module of ``weights.base``, and only read.

    Raises:
        RuntimeError: the package cannot be used; see `mixlora_missing`.
        TypeError: ``mlp`` is no LlamaMLP.
        ValueError: ``mlp`` has other weights than ``weights.base``.
    """
    missing = mixlora_missing()
    if missing is not None:
        raise RuntimeError(missing)
    _check(weights, spec)
    mlp = _llama(mlp)
    base = weights.base.dense()
    for name, tensor in zip(PROJECTIONS, (base.gate, base.up, base.down), strict=True):
        if getattr(mlp, name).weight.data_ptr() != tensor.data_ptr():
            raise ValueError(f"mlp.{name} is another tensor than weights.base has; give the MLP that the layer adapts")
    moe, linears = _mixlora_module(mlp, weights, spec)

    def layer(x: Tensor) -> Tensor:
        for stacked, held in zip(weights.experts.lora.pairs, linears, strict=True):
            for linear, own in zip(held, stacked.unbind(), strict=True):
                vars(linear)["weight"] = own  # nn.Module's own assignment would be 5% of a call for one token
        return moe(x[None])[0]  # it wants [batch, tokens, D]

    return rounds_of(layer, weights.gru, spec)


def mixlora_missing() -> str | None:
    """Why `mixlora_package` cannot be used, or None if it can."""
    return _import_error("mixlora", "mixlora", "mixlora.model")


def _mixlora_module(mlp: LlamaMLP, weights: LayerWeights, spec: RethinkingSpec) -> tuple[nn.Module, list[list[Any]]]:
    """The package's ``MixLoraSparseMoe`` over ``mlp``, and its linears without weights: n for each field of experts.

    A Parameter cannot be a slice that passes gradients on to the stack of all experts; a plain attribute can, so the
    linears lose their Parameters and are handed slices before they run.
    """
    package, lora_linear = importlib.import_module("mixlora.model"), importlib.import_module("mixlora.lora_linear")
    num_experts, rank, _ = weights.experts.lora.gate_A.shape
    config = package.MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "",
            "task_type": "CAUSAL_LM",
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "r": rank,
            "lora_alpha": spec.scale * rank,
            "lora_dropout": 0.05,  # it refuses 0; its linears are put in evaluation mode below
            "target_modules": list(PROJECTIONS),
            "num_experts": num_experts,
            "top_k": spec.top_k,
        }
    )
    assert isinstance(weights.experts, ChosenExperts)
    config.model_type_, config.dtype_ = "llama", weights.experts.router.dtype
    config.act_fn_ = get_activation(spec.activation).function  # left out, it would be None and be called all the same
    moe = package.MixLoraSparseMoe(mlp, config)
    moe.gate_ = weights.experts.router
    linears: list[list[Any]] = []
    for name in PROJECTIONS:
        loras = [lora_linear.LoraLinear(getattr(mlp, name), config).eval() for _ in range(num_experts)]
        moe.experts_ |= {f"experts.{i}.{name}": lora for i, lora in enumerate(loras)}
        linears += [[lora.lora_A for lora in loras], [lora.lora_B for lora in loras]]
    for held in linears:
        for linear in held:
            del linear.weight
    return moe, linears


def peft_lora(mlp: nn.Module, rank: int, alpha: float, generator: torch.Generator | None = None) -> nn.Module:
    """The MLP with PEFT's LoRA on its three linears: one adapter instead of n experts, no router, one round.

    A [r, in] is drawn as PEFT draws it (on the CPU, by ``generator``), B [out, r] uniformly too instead of zero, so
    that every term counts; both have the MLP's dtype. There is no dropout. The MLP is not changed, its memory shared;
    trainable are the tensors of `lora_tensors` alone.

    Raises:
        TypeError: ``mlp`` is no LlamaMLP.
    """
    wrapped = _sharing(LlamaMLP, _llama(mlp))
    number: Any = alpha  # PEFT declares an int and takes any number
    config = LoraConfig(r=rank, lora_alpha=number, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    wrapped = inject_adapter_in_model(config, wrapped)
    with torch.no_grad():
        for tensor in lora_tensors(wrapped).values():
            bound = 1 / math.sqrt(tensor.shape[1])
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
    return wrapped


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
        y = x @ getattr(base, name).T + scale * (x @ lora[f"{name}_A"].T) @ lora[f"{name}_B"].T
        bias = getattr(base, f"{name}_bias")
        return y if bias is None else y + bias

    gate = adapted(x, "gate")
    return adapted(gate * torch.sigmoid(gate) * adapted(x, "up"), "down")


def liger_mlp(mlp: nn.Module) -> nn.Module:
    """Liger-Kernel's ``LigerSwiGLUMLP`` over the MLP's frozen weights, whose memory it shares.

    Its backward overwrites what its forward saved, so a graph gives right gradients once.

    Raises:
        RuntimeError: the package cannot be used on the MLP's device; see `liger_missing`.
        TypeError: ``mlp`` is no LlamaMLP.
    """
    mlp = _llama(mlp)
    missing = liger_missing(mlp.down_proj.weight.device)
    if missing is not None:
        raise RuntimeError(missing)
    return _sharing(importlib.import_module("liger_kernel.transformers").LigerSwiGLUMLP, mlp)


def liger_missing(device: torch.device) -> str | None:
    """Why `liger_mlp` cannot be used on a device, or None if it can."""
    reason = _import_error("liger_kernel", "liger-kernel", "liger_kernel.transformers")
    if reason is None and device.type != "cuda":
        return f"Liger-Kernel runs on CUDA devices, this is {device}"
    return reason


def _sharing(kind: Any, mlp: LlamaMLP) -> nn.Module:
    """A new MLP of class ``kind`` whose parameters are frozen and share the memory of ``mlp``'s."""
    with torch.device("meta"):
        twin = kind(mlp.config)
    for name in PROJECTIONS:
        linear, own = getattr(mlp, name), getattr(twin, name)
        own.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        own.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    return twin


def _llama(mlp: nn.Module) -> LlamaMLP:
    if not isinstance(mlp, LlamaMLP):
        raise TypeError(f"the peers are built from a transformers LlamaMLP, got {type(mlp).__name__}")
    return mlp


def _import_error(package: str, distribution: str, module: str) -> str | None:
    """Why ``module`` of ``package`` cannot be imported, or None if it can."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install {distribution})"
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever it raises, an assert on a version among them, is the reason
        return f"{package} cannot be imported: {type(error).__name__}: {error}"
    return None
