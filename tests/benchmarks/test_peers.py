"""The others that the benchmarks compare with: each computes what it says, from the very tensors that it is given."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks import peers
from benchmarks.checks import verdict
from graphmoe_kernels import DenseMLP, LayerWeights, RethinkingSpec, rethink, rethink_reference
from graphmoe_kernels.testing import SLACK, cast_layer, make_layer, relative_error, trainable, within_budget

D, F, EXPERTS, RANK, WIDTH, TOKENS = 24, 40, 5, 3, 6, 33
UNCHOSEN = 3
CUDA = torch.device("cuda")


def llama(base: DenseMLP) -> LlamaMLP:
    """An MLP module over the tensors of ``base``."""
    with torch.device("meta"):
        mlp = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=F, num_attention_heads=1))
    for name, weight in zip(peers.PROJECTIONS, (base.gate, base.up, base.down), strict=True):
        getattr(mlp, name).weight = nn.Parameter(weight)
    return mlp


def problem(rounds: int, dtype: torch.dtype = torch.float64) -> tuple[LayerWeights, Tensor, Tensor]:
    """A layer, x and the gradient of y. Feature 0 of x is 1 in every round and keeps expert `UNCHOSEN` unchosen."""
    weights = make_layer(D, F, EXPERTS, RANK, WIDTH if rounds > 1 else None, bias=False, dtype=dtype)
    weights.experts.router[UNCHOSEN] = 0
    weights.experts.router[UNCHOSEN, 0] = -50
    if weights.gru is not None:
        weights.gru.output[0] = 0
    x, upstream = torch.randn(2, TOKENS, D, dtype=torch.float64).to(dtype).unbind()
    x[:, 0] = 1
    return cast_layer(weights, dtype, requires_grad=True), x, upstream


def results(forward: peers.Forward, x: Tensor, upstream: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """y, and the gradients of x and of the leaves."""
    leaf = x.detach().clone().requires_grad_()
    y = forward(leaf)
    gradients = torch.autograd.grad(y, [leaf, *leaves.values()], upstream.to(y.dtype))
    return {"y": y.detach(), "x": gradients[0], **dict(zip(leaves, gradients[1:], strict=True))}


def assert_same(found: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> None:
    errors = {name: relative_error(found[name], right) for name, right in oracle.items()}
    assert found.keys() == oracle.keys()
    assert max(errors.values()) < SLACK[torch.float64], errors


@pytest.mark.parametrize("candidate_activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("candidate_input", ["expert_output", "hidden_state"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_mixlora_is_the_layer(rounds, candidate_input, candidate_activation):
    """A comparison with a peer that computes something else is worth nothing, in a forward or in a training step.

    After an optimizer's step too: a forward that kept slices of the weights would train on old ones.
    """
    weights, x, upstream = problem(rounds)
    settings = {"candidate_input": candidate_input, "candidate_activation": candidate_activation}
    spec, leaves = RethinkingSpec(rounds, 2, scale=2.0, **settings), trainable(weights)
    forward = peers.peer_mixlora(weights, spec)
    for _ in range(2):
        found = results(forward, x, upstream, leaves)
        assert_same(found, results(lambda x: rethink_reference(x, weights, spec), x, upstream, leaves))
        assert not found["gate_B"][UNCHOSEN].any()
        assert all(found[name][0].any() for name in ("gate_A", "gate_B", "up_A", "up_B", "down_A", "down_B"))
        with torch.no_grad():
            assert torch.equal(forward(x), found["y"])
            for name, leaf in leaves.items():
                leaf -= 1e-3 * found[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixlora_in_low_precision(dtype):
    """Every token takes every expert, so rounding chooses nothing: the error is the arithmetic's alone."""
    weights, x, upstream = problem(3, dtype)
    spec = RethinkingSpec(3, EXPERTS, scale=2.0)
    exact = cast_layer(weights, torch.float64, requires_grad=True)
    oracle = results(lambda x: rethink_reference(x, exact, spec), x.double(), upstream.double(), trainable(exact))
    plain = results(
        lambda x: rethink(x, weights, spec, fold="never", backend="reference").y, x, upstream, trainable(weights)
    )
    found = results(peers.peer_mixlora(weights, spec), x, upstream, trainable(weights))
    assert {t.dtype for t in found.values()} == {dtype}
    assert verdict(found, plain, oracle, dtype).fault is None


def test_peft_lora_is_lora():
    """W x + s B A x in every linear, with every gradient; B drawn, or its terms would be zero and prove nothing.

    The same seed has to give the same problem on every machine.
    """
    weights, x, upstream = problem(1)
    modules = [peers.peft_lora(llama(weights.base), RANK, 2.0 * RANK, seed) for seed in (1, 1, 2)]
    lora, again, other = map(peers.lora_tensors, modules)
    assert all(t.any() and torch.equal(t, again[name]) and not t.equal(other[name]) for name, t in lora.items())
    assert {id(p) for p in modules[0].parameters() if p.requires_grad} == {id(tensor) for tensor in lora.values()}
    found = results(modules[0], x, upstream, lora)
    assert_same(
        found, results(lambda x: peers.peft_lora_reference(x, weights.base.dense(), lora, 2.0), x, upstream, lora)
    )
    with torch.no_grad():
        assert torch.equal(modules[0].eval()(x), found["y"])


def test_peft_lora_is_in_the_mlps_dtype():
    """PEFT could keep the adapter in fp32 and cast around it, which the other providers do not."""
    weights, x, _ = problem(1, torch.bfloat16)
    module = peers.peft_lora(llama(weights.base), RANK, 2.0 * RANK, 0)
    lora = peers.lora_tensors(module)
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    exact = cast_layer(weights, torch.float64).base.dense()
    oracle = peers.peft_lora_reference(x.double(), exact, {name: t.double() for name, t in lora.items()}, 2.0)
    plain = peers.peft_lora_reference(x, weights.base.dense(), lora, 2.0)
    assert within_budget(relative_error(module(x), oracle), relative_error(plain, oracle), torch.bfloat16)


@pytest.mark.parametrize("peer", ["lora", "liger"])
def test_a_peer_shares_the_mlp_and_leaves_it_alone(peer):
    """A copy would not fit at 8B sizes; a change would reach every other provider of the same MLP."""
    if peer == "liger" and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger_kernel is not installed")
    weights, x, _ = problem(1)
    mlp = llama(weights.base)
    before, modules = mlp(x), list(mlp.modules())
    module = peers.peft_lora(mlp, RANK, 6, 0) if peer == "lora" else peers.liger_mlp(mlp)  # to be built it needs no GPU
    if peer == "lora":
        module(x).sum().backward()
    module.eval()
    stored = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert {p.untyped_storage().data_ptr() for p in mlp.parameters()} <= stored
    assert list(mlp.modules()) == modules
    assert all(m.training for m in modules)
    assert all(p.requires_grad and p.grad is None for p in mlp.parameters())
    assert torch.equal(mlp(x), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_is_the_mlp(dtype):
    """What is timed as Liger's MLP is the dense MLP, forward and backward."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if missing := peers.liger_missing(device):
        pytest.skip(missing)
    weights, x, upstream = (t.to(device) if isinstance(t, Tensor) else t for t in problem(1, dtype))
    mlp = llama(cast_layer(weights, dtype, str(device)).base.dense())
    exact = llama(cast_layer(weights, torch.float64, str(device)).base.dense())
    oracle = results(exact, x.double(), upstream.double(), {})
    plain, found = (results(module, x, upstream, {}) for module in (mlp, peers.liger_mlp(mlp)))
    assert verdict(found, plain, oracle, dtype).fault is None


def test_why_liger_cannot_run_is_said(monkeypatch):
    """What to install, what its import said (an assert on a version), or that there is no GPU."""

    def refuse(name):
        raise AssertionError("requires transformers>=99")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.liger_missing(CUDA) == "liger_kernel is not installed (pip install liger-kernel)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", refuse)
    assert peers.liger_missing(CUDA) == "liger_kernel cannot be imported: AssertionError: requires transformers>=99"
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    assert peers.liger_missing(torch.device("cpu")) == "Liger-Kernel runs on CUDA devices, this is cpu"
    assert peers.liger_missing(torch.device("cuda", 0)) is None


def test_peers_are_built_from_llamas_mlp():
    """Another MLP has other projections; wrapping it would give a module that computes something else."""
    with pytest.raises(TypeError, match="from a transformers LlamaMLP, got Linear"):
        peers.peft_lora(nn.Linear(D, D), RANK, 6, 0)
