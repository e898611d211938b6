"""Architectures of Transformers: attach, train, save, load, generate, unload."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from graphmoe_model import FusedGraphMoEFFN
from tests.model.tiny_models import ARCHITECTURES, logits, tiny_config, tiny_model, tokens, train_step

# Logits are of order 1 to 10; what separates a fresh adapter from the base model is fp32 rounding alone, which two
# layers of width 32 keep below a few ulp of the largest activation.
ROUNDING = 1e-5


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_from_attaching_to_unloading(model_type, tmp_path):
    base = tiny_model(model_type)
    expected = logits(base)
    model = get_peft_model(base, tiny_config())
    layers = [module for module in model.modules() if isinstance(module, FusedGraphMoEFFN)]
    assert len(layers) == 2

    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = train_step(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    # B and W_g start at zero, so nothing but they (and the router, whose loss is its own) has a gradient yet.
    assert {name for name in changed if "lora_" not in name} == set()
    assert all(any(part in name for name in changed) for part in ("lora_B", "_proj.B", "output_proj", "router"))
    assert train_step(model) < first
    still = {name for name, p in model.named_parameters() if "lora_" in name and torch.equal(before[name], p)}
    assert still == set()

    trained = logits(model)
    assert not torch.allclose(trained, expected, atol=0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(model_type), tmp_path)
    assert torch.equal(logits(again), trained)

    prompt = tokens()
    generated = again.generate(input_ids=prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(generated, greedy(again, prompt, 4))

    assert torch.equal(logits(model.unload()), expected)


def greedy(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding without a cache: the whole sequence at every step, the end token barred."""
    for _ in range(steps):
        scores = logits(model, ids)[:, -1]
        scores[:, 2] = -torch.inf
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    return ids
