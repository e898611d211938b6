"""Checkpoints as MoE-PEFT writes them, from their names and shapes alone, and what a model computes with one.

Nothing here is taken from `graphmoe_model`, so that an error of the conversion cannot be an error of these too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# The sizes of `tiny_model`.
LAYERS, HIDDEN, INTERMEDIATE = 2, 32, 48
SIZES = {  # linear -> (in, out)
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, 16),
    "v_proj": (HIDDEN, 16),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
STEM = {
    "MIXLORA": "mixlora.layers",
    "LORAMOE": "loramoe.layers",
    "MOLA": "mola.layers",
    "LORA": "base_model.model.model.layers",
}
KINDS = tuple(STEM)


def peer_settings(kind: str, **changes: Any) -> dict[str, Any]:
    """The adapter_config.json of a kind; None in ``changes`` takes a field out."""
    settings: dict[str, Any] = {
        "bias": "none",
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/llama",
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": [*(ATTENTION if kind != "LORAMOE" else ()), *MLP],
    }
    if kind != "LORA":
        settings |= {"routing_strategy": kind.lower(), "num_experts": 3}
    if kind in ("MIXLORA", "MOLA"):
        settings["top_k"] = 2
    return {name: value for name, value in {**settings, **changes}.items() if value is not None}


def peer_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Every tensor of the checkpoint, by name."""
    kind, shapes = settings["peft_type"], {}
    for layer in range(LAYERS):
        if kind == "MIXLORA":
            shapes[f"mixlora.layers.{layer}.mlp.moe_gate.weight"] = (settings["num_experts"], HIDDEN)
        for linear in settings["target_modules"]:
            fro, to = SIZES[linear]
            part = "self_attn" if linear in ATTENTION else "mlp"
            path = f"{STEM[kind]}.{layer}.{part}.{linear}"
            r = settings["r"]
            if kind == "MIXLORA" and part == "mlp":
                r = settings.get("expert_lora", {}).get("r", r)
            routed = kind in ("LORAMOE", "MOLA")
            if routed:
                shapes[f"{path}.moe_gate.weight"] = (settings["num_experts"], fro)
            mixed = routed or (kind == "MIXLORA" and part == "mlp")
            for at in [f"{path}.experts.{e}" for e in range(settings["num_experts"])] if mixed else [path]:
                shapes |= {f"{at}.lora_A.weight": (r, fro), f"{at}.lora_B.weight": (to, r)}
    return shapes


def peer_tensors(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors of these names; routers so large that they do choose."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(shape, generator=generator) * (1.0 if "moe_gate" in name else 0.3)).to(dtype)
        for name, shape in peer_shapes(settings).items()
    }


def write_peer(
    folder: Path, settings: dict[str, Any], tensors: dict[str, Any] | None = None, *, safetensors: bool = False
) -> Path:
    """The folder with both files; parameters in the .bin, as MoE-PEFT saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = peer_tensors(settings) if tensors is None else tensors
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=4))
    if safetensors:
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save({name: nn.Parameter(value) for name, value in tensors.items()}, folder / "adapter_model.bin")
    return folder


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same tensors under the same names: values and dtypes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# --- what it computes ------------------------------------------------------------------------------------------------


class PeerLinear(nn.Module):
    """W x + b, and what a checkpoint adds to it: s B A x, or s sum_i p_i(x) B_i A_i x with the linear's own router."""

    def __init__(self, base: nn.Linear, settings: dict[str, Any], tensors: dict[str, Tensor], path: str) -> None:
        super().__init__()
        self.base, self.settings, self.tensors, self.path = base, settings, tensors, path

    def forward(self, x: Tensor) -> Tensor:
        y, router = self.base(x), self.tensors.get(f"{self.path}.moe_gate.weight")
        if router is None:
            return y + lora(self.settings, self.tensors, self.path, x)
        weights = routing(self.settings, x, router)
        for e in range(router.shape[0]):
            y = y + weights[..., e, None] * lora(self.settings, self.tensors, f"{self.path}.experts.{e}", x)
        return y


class PeerMixLoRA(nn.Module):
    """sum_i p_i(x) E_i(x), every expert a whole MLP with LoRA in its linears."""

    def __init__(self, mlp: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor], path: str) -> None:
        super().__init__()
        self.mlp, self.tensors, self.path = mlp, tensors, path
        self.settings = settings
        self.expert_settings = {**settings, **settings.get("expert_lora", {})}

    def forward(self, x: Tensor) -> Tensor:
        router = self.tensors[f"{self.path}.moe_gate.weight"]
        weights = routing(self.settings, x, router)
        return sum(weights[..., e, None] * self._expert(e, x) for e in range(router.shape[0]))  # type: ignore[return-value]

    def _expert(self, e: int, x: Tensor) -> Tensor:
        def projected(linear: str, v: Tensor) -> Tensor:
            y = getattr(self.mlp, linear)(v)
            if linear not in self.settings["target_modules"]:
                return y
            return y + lora(self.expert_settings, self.tensors, f"{self.path}.{linear}.experts.{e}", v)

        return projected("down_proj", self.mlp.act_fn(projected("gate_proj", x)) * projected("up_proj", x))


def lora(settings: dict[str, Any], tensors: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
    """s B A x, with s = alpha / r, or alpha / sqrt(r)."""
    A, B = tensors[f"{path}.lora_A.weight"].to(x.dtype), tensors[f"{path}.lora_B.weight"].to(x.dtype)
    r = settings["r"]
    return (x @ A.T @ B.T) * (settings["lora_alpha"] / (math.sqrt(r) if settings.get("use_rslora") else r))


def routing(settings: dict[str, Any], x: Tensor, router: Tensor) -> Tensor:
    """The softmax over all experts (LoRAMoE), or over the top k, others zero."""
    p = (x @ router.to(x.dtype).T).softmax(-1)
    if settings["peft_type"] == "LORAMOE":
        return p
    k = settings.get("top_k", 2)
    threshold = p.sort(-1, descending=True).values[..., k - 1, None]
    p = torch.where(p >= threshold, p, 0.0)
    return p / p.sum(-1, keepdim=True)


def with_peer_adapter(model: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The model with its linears or MLPs replaced by what the checkpoint makes of them."""
    stem = STEM[settings["peft_type"]]
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        for linear in settings["target_modules"]:
            part = "self_attn" if linear in ATTENTION else "mlp"
            if part == "mlp" and settings["peft_type"] == "MIXLORA":
                continue
            parent = getattr(layer, part)
            path = f"{stem}.{number}.{part}.{linear}"
            setattr(parent, linear, PeerLinear(getattr(parent, linear), settings, tensors, path))
        if settings["peft_type"] == "MIXLORA":
            layer.mlp = PeerMixLoRA(layer.mlp, settings, tensors, f"{stem}.{number}.mlp")
    return model
