"""torch.compile of every kind of experts: one graph, the eager values and gradients, never a stale fold."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig
from graphmoe_model.layers.linear import RoutedLoRALinear

pytestmark = pytest.mark.methods

HIDDEN = 32
TOLERANCE = 1e-10  # fp64
FORMS = {
    "DoRA": {"method": "lora", "use_dora": True},
    "GraphMoE(MixDoRA)": {"method": "mixlora", "use_dora": True, "rounds": 2},
    "GraphMoE(LoRAMoE)": {"method": "loramoe", "rounds": 2},
    "GraphMoE(MoDA)": {"method": "mola", "use_dora": True, "rounds": 2},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(form: str) -> nn.Module:
    """A small layer in which every term counts; "MoDA's attention" is a linear."""
    settings = {"r": 4, "gru_hidden_scale": 0.4, "lora_dropout": 0.0, "init_lora_weights": False}
    if form == "MoDA's attention":
        config = GraphMoEConfig(method="mola", use_dora=True, rounds=1, num_experts=4, **settings)
        return RoutedLoRALinear(nn.Linear(HIDDEN, 24, bias=True), config).double()
    mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=48, mlp_bias=True))
    if FORMS[form]["method"] != "lora":
        settings["num_experts"] = 4
    return FusedGraphMoEFFN(mlp, GraphMoEConfig(**FORMS[form], **settings)).double()


# Compiling takes seconds: DoRA's forms have everything that the plain ones have.
QUICK = ["GraphMoE(MixDoRA)", "GraphMoE(MoDA)", "MoDA's attention"]
LAYERS = [*QUICK, *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form not in QUICK)]


@pytest.mark.parametrize("form", LAYERS)
def test_training_compiles_to_one_graph_with_equal_gradients(form):
    """DoRA's norms and the mixtures of experts are part of the graph, not a break in it."""
    layer = make(form).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    upstream, results = None, []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        upstream = torch.randn_like(y) if upstream is None else upstream
        results.append([y, *torch.autograd.grad(y, [leaf, *parameters], upstream)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", LAYERS)
@torch.no_grad()
def test_compiled_inference_never_uses_a_stale_fold(form):
    """A change of any trained tensor, or of the base that DoRA's norms read, reaches the compiled graph."""
    layer = make(form).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    for _ in range(3):
        before = compiled(x)
    for name, parameter in layer.named_parameters():
        if "reset_gate" in name:  # it multiplies a state that is zero in the one step that two rounds take
            continue
        parameter.mul_(1.5).add_(0.05)
        fresh = layer(x)
        assert not torch.allclose(fresh, before), name
        before = compiled(x)
        torch.testing.assert_close(before, fresh, rtol=0, atol=TOLERANCE, msg=name)
