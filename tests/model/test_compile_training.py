"""torch.compile of a whole model with an adapter: the router loss's hooks are traced with it."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.model.router_losses import IDS, LEFT_PADDED
from tests.model.tiny_models import tiny_config, tiny_model


def losses(model: PeftModel, forward: torch.nn.Module) -> list[float]:
    """Of three steps with labels, padding and the router loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(3):
        loss = forward(input_ids=IDS, attention_mask=LEFT_PADDED, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("part", ["the PEFT model", "the base model in it", "its decoder layers"])
def test_a_compiled_model_trains_as_an_uncompiled_one(part: str) -> None:
    """Its first forward makes this thread's state: a graph must not guard on that state's absence."""
    torch._dynamo.reset()
    results = []
    layers = 1 if part == "the PEFT model" else 2  # its forward is traced many times; what two layers add, the base has
    for compiled in (False, True):
        base = tiny_model(num_hidden_layers=layers)
        model = get_peft_model(base, tiny_config(init_lora_weights=False, rounds=2, router_aux_loss_coef=0.5)).train()
        forward = model.base_model.model if part == "the base model in it" else model
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lru_cache.*")  # one that Dynamo prints for what it cannot see
            if compiled and part == "its decoder layers":
                for layer in model.base_model.model.model.layers:
                    layer.compile(backend="eager")
            elif compiled:
                forward = torch.compile(forward, backend="eager")
            results.append(losses(model, forward))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=0)
    assert results[0][2] != results[0][0]
    torch._dynamo.reset()
