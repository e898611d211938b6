"""A tiny Llama with an adapter of any method, as PEFT makes it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from graphmoe_model import GraphMoEConfig
from tests.model.method_oracles import form_config
from tests.model.tiny_models import tiny_model, tokens

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = ("gate_proj", "up_proj", "down_proj")
LAYERS = 2
D, F = 32, 48
OUT = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}


def config(form: str, **options) -> GraphMoEConfig:
    return form_config(form, **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "gru_hidden_scale": 0.25, **options})


def adapted(form: str, base: nn.Module | None = None, **options) -> PeftModel:
    """A tiny model with an adapter of the form, in which every term counts."""
    return get_peft_model(base or tiny_model(), config(form, **options))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Every trainable parameter away from its first value, the routers further than the rest."""
    for name, parameter in trained_parameters(model).items():
        if parameter.any():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
        else:  # the GRU's bias, and B of an adapter that starts as the base model
            parameter.normal_(std=0.1)
        if name.endswith("router.weight"):
            parameter.mul_(20)


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.01)
    for step in range(steps):
        ids = tokens(2, 8, seed=step)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_and_loaded(model: PeftModel, folder: Path) -> PeftModel:
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_model(), folder)


def decoder_layers(model: PeftModel) -> list[nn.Module]:
    return list(model.get_base_model().model.layers)


def as_lora(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The stacked tensors of one expert by PEFT's names."""
    parts = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
    parts["magnitude"] = "lora_magnitude_vector.default.weight"
    state = {}
    for name, tensor in parameters.items():
        path, _, part = name.rpartition(".")
        stacked = "lora_graphmoe.default.experts." in path
        path = path.replace("lora_graphmoe.default.experts.", "")
        state[f"{path}.{parts[part]}" if stacked else name] = tensor[0] if stacked else tensor
    return state
