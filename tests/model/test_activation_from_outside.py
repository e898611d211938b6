"""An activation that a user registers, with Triton forms of its own, in a layer of this package."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from graphmoe_kernels import ACTIVATIONS, GateUp, register_activation, swiglu
from graphmoe_kernels.testing import relative_error
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def bent():
    """The activation of `tests.kernels.user_activation`, registered for one test by public calls."""
    from tests.kernels import user_activation as user

    register_activation(
        "test_bent",
        user.bent,
        user.bent_derivative,
        triton=user.triton_bent,
        triton_derivative=user.triton_bent_derivative,
    )
    yield user.bent
    del ACTIVATIONS["test_bent"]


def make_ffn(activation, backend):
    """A layer around an MLP whose activation is a plain function."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48))
    del mlp.act_fn
    mlp.act_fn = activation
    settings = {"r": 4, "num_experts": 4, "gru_hidden_scale": 0.5, "lora_dropout": 0.0, "init_lora_weights": False}
    return FusedGraphMoEFFN(mlp, GraphMoEConfig(rounds=2, backend=backend, **settings)).to(DEVICE)


def test_layer_runs_it_on_either_backend(bent):
    """Values and gradients of a layer with rethinking: on Triton as on PyTorch, whose oracle is autograd's fp64."""
    ffn = make_ffn(bent, "torch")
    x = torch.randn(1, 20, 32, dtype=torch.float64, device=DEVICE)
    upstream = torch.randn_like(x)
    found = {}
    for backend, dtype in (("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
        layer = make_ffn(bent, backend).to(dtype)
        layer.load_state_dict(ffn.state_dict())
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = layer(leaf)
        y.backward(upstream.to(dtype))
        found[backend, dtype] = {"y": y, "x": leaf.grad}
    exact = found["torch", torch.float64]
    for name in exact:
        assert relative_error(found["torch", torch.float32][name], exact[name]) <= 1e-5, name
        assert relative_error(found["triton", torch.float32][name], exact[name]) <= 1e-5, name


def test_the_documented_example_runs_on_triton(tmp_path, monkeypatch):
    """docs/extending.md: its file, imported as it stands there, computes on Triton what it computes on PyTorch."""
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (code,) = (
        code for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "@triton" in code
    )
    (tmp_path / "wave.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    importlib.import_module("wave")
    try:
        found = []
        for backend in ("torch", "triton"):
            gate = torch.linspace(-4, 4, 40, device=DEVICE)[None].requires_grad_()
            hidden = swiglu(GateUp(gate, torch.ones_like(gate)), activation="wave", backend=backend)
            found.append((hidden, *torch.autograd.grad(hidden.sum(), gate)))
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
    finally:
        del ACTIVATIONS["wave"]


COMPILE = """
import torch
from graphmoe_kernels import register_activation
from graphmoe_kernels.aot import absent_gpu
from graphmoe_kernels.experts.operands import GateUp
from graphmoe_kernels.experts.triton import launch
from graphmoe_kernels.launching import stubbed
from tests.kernels import user_activation as user

forms = {"triton": user.triton_bent, "triton_derivative": user.triton_bent_derivative}
register_activation("bent", user.bent, user.bent_derivative, **forms)
gate, up = (torch.empty(8, 256, dtype=torch.bfloat16, device="meta") for _ in range(2))
with absent_gpu("sm_90"), stubbed(bind=True):
    hidden = launch.swiglu(GateUp(gate, up), None, "bent")
    launch.swiglu_backward(hidden, GateUp(gate, up), None, "bent", frozenset())
print("compiled")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the layer above compiles it on a GPU")
def test_it_compiles():
    """Triton's interpreter runs what its compiler rejects: the same functions are compiled for a GPU as well."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "compiled", result.stderr
