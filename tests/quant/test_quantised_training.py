"""`graphmoe train` over bases that bitsandbytes holds in 4 and 8 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

from tests.model.training_runs import make_base, model_of, recipe, trained

pytestmark = pytest.mark.quant


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_trains(option, tmp_path):
    """Its linears are quantised, the adapter is in fp32, and every tensor of it moves."""
    base = make_base(tmp_path / "base", hidden_size=64)
    settings = {option: True, "max_steps": 3, "rounds": 3, "gru_hidden_scale": 0.1}
    model = model_of(recipe(base, tmp_path / "x", **settings).resolved())
    linear = model.base_model.model.model.layers[0].mlp.base_layer.gate_proj
    assert "bitsandbytes" in type(linear).__module__
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name.replace(".default", ""): p.detach().clone() for name, p in trainable.items()}
    result = trained(base, tmp_path / "out", **settings)
    assert result.last_loss is not None
    saved = load_file(Path(tmp_path / "out" / "adapter_model.safetensors"))
    assert saved.keys() == start.keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert [name for name, tensor in saved.items() if torch.equal(tensor, start[name])] == []
