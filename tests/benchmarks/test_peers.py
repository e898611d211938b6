"""The others that the benchmarks compare with: each computes what it says, from the very tensors that it is given."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping

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
SPEC = RethinkingSpec(1, 2, scale=2.0)
CUDA = torch.device("cuda")

needs_mixlora = pytest.mark.skipif(peers.mixlora_missing() is not None, reason=str(peers.mixlora_missing()))


def published(mlp, weights, spec):
    return peers.peer_mixlora(weights, spec)


@pytest.fixture(params=[published, pytest.param(peers.mixlora_package, marks=needs_mixlora)])
def build(request) -> Callable[..., peers.Forward]:
    """Both forms of MixLoRA; the package's own only where it is installed."""
    return request.param


def llama(base: DenseMLP) -> LlamaMLP:
    """An MLP module over the tensors of ``base``."""
    config = LlamaConfig(hidden_size=D, intermediate_size=F, num_attention_heads=1, mlp_bias=base.gate_bias is not None)
    with torch.device("meta"):
        mlp = LlamaMLP(config)
    weights, biases = (base.gate, base.up, base.down), (base.gate_bias, base.up_bias, base.down_bias)
    for name, weight, bias in zip(peers.PROJECTIONS, weights, biases, strict=True):
        linear = getattr(mlp, name)
        linear.weight = nn.Parameter(weight)
        linear.bias = None if bias is None else nn.Parameter(bias)
    return mlp


def problem(rounds: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[LayerWeights, Tensor, Tensor]:
    """A layer, x and the gradient of y. Feature 0 of x is 1 in every round and keeps expert `UNCHOSEN` unchosen."""
    weights = make_layer(D, F, EXPERTS, RANK, WIDTH if rounds > 1 else None, bias=bias, dtype=dtype)
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
def test_mixlora_is_the_layer(build, rounds, candidate_input, candidate_activation):
    """A comparison with a peer that computes something else is worth nothing, in a forward or in a training step."""
    weights, x, upstream = problem(rounds)
    spec = RethinkingSpec(
        rounds, 2, scale=2.0, candidate_input=candidate_input, candidate_activation=candidate_activation
    )
    forward = build(llama(weights.base), weights, spec)
    found = results(forward, x, upstream, trainable(weights))
    assert_same(found, results(lambda x: rethink_reference(x, weights, spec), x, upstream, trainable(weights)))
    assert not found["gate_B"][UNCHOSEN].any()
    assert all(found[name][0].any() for name in ("gate_A", "gate_B", "up_A", "up_B", "down_A", "down_B"))
    with torch.no_grad():
        assert torch.equal(forward(x), found["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixlora_in_low_precision(build, dtype):
    """Every token takes every expert, so rounding chooses nothing: the error is the arithmetic's alone."""
    weights, x, upstream = problem(3, dtype, bias=False)
    spec = RethinkingSpec(3, EXPERTS, scale=2.0)
    exact = cast_layer(weights, torch.float64, requires_grad=True)
    oracle = results(lambda x: rethink_reference(x, exact, spec), x.double(), upstream.double(), trainable(exact))
    plain = results(
        lambda x: rethink(x, weights, spec, fold="never", backend="reference").y, x, upstream, trainable(weights)
    )
    found = results(build(llama(weights.base), weights, spec), x, upstream, trainable(weights))
    assert {t.dtype for t in found.values()} == {dtype}
    assert verdict(found, plain, oracle, dtype).fault is None


def test_mixlora_sees_an_optimizer_step(build):
    """A forward that kept slices of the weights would fail, or train on old ones, after the first step."""
    weights, x, upstream = problem(3)
    spec, leaves = RethinkingSpec(3, 2, scale=2.0), trainable(weights)
    forward = build(llama(weights.base), weights, spec)
    optimizer = torch.optim.SGD(leaves.values(), lr=1e-3)
    before = forward(x).detach()
    for _ in range(2):
        forward(x).backward(upstream)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(forward(x), before)
    oracle = results(lambda x: rethink_reference(x, weights, spec), x, upstream, leaves)
    assert_same(results(forward, x, upstream, leaves), oracle)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"normalize": False}, "use a spec with normalize=True"),
        ({"dropout": 0.1}, "without dropout, got 0.1"),
        ({"rounds": 2}, "2 rounds need a GRU"),
    ],
)
def test_mixlora_refuses_what_it_has_not(build, settings, message):
    """A setting that is silently left out makes the peer look faster than it is."""
    weights, _, _ = problem(1)
    with pytest.raises(ValueError, match=message):
        build(llama(weights.base), weights, SPEC._replace(**settings))


@needs_mixlora
def test_the_package_needs_the_layers_own_mlp():
    """Over another MLP it would be timed, and judged, with other weights than everyone else's."""
    weights, _, _ = problem(1)
    other = llama(problem(1)[0].base)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj is another tensor than weights\.base has"):
        peers.mixlora_package(other, weights, SPEC)


@needs_mixlora
def test_the_package_leaves_the_mlp_alone():
    """It usually replaces the forward of the MLP it adapts, which others here share."""
    weights, x, _ = problem(1)
    mlp = llama(weights.base)
    before, attributes, modules = mlp(x), set(vars(mlp)), list(mlp.modules())
    peers.mixlora_package(mlp, weights, SPEC)(x)
    assert torch.equal(mlp(x), before)
    assert set(vars(mlp)) == attributes
    assert list(mlp.modules()) == modules
    assert mlp.training


@pytest.mark.parametrize("bias", [False, True])
def test_peft_lora_is_lora(bias):
    """W x + s B A x in every linear, with every gradient; B drawn, or its terms would be zero and prove nothing."""
    weights, x, upstream = problem(1, bias=bias)
    module = peers.peft_lora(llama(weights.base), RANK, 2.0 * RANK, torch.Generator().manual_seed(3))
    lora = peers.lora_tensors(module)
    assert all(tensor.any() for tensor in lora.values())
    assert {id(p) for p in module.parameters() if p.requires_grad} == {id(tensor) for tensor in lora.values()}
    found = results(module, x, upstream, lora)
    assert_same(
        found, results(lambda x: peers.peft_lora_reference(x, weights.base.dense(), lora, 2.0), x, upstream, lora)
    )
    with torch.no_grad():
        assert torch.equal(module.eval()(x), found["y"])


def test_peft_lora_is_in_the_mlps_dtype():
    """PEFT could keep the adapter in fp32 and cast around it, which the other providers do not."""
    weights, x, _ = problem(1, torch.bfloat16)
    module = peers.peft_lora(llama(weights.base), RANK, 2.0 * RANK)
    assert {tensor.dtype for tensor in peers.lora_tensors(module).values()} == {torch.bfloat16}
    exact = cast_layer(weights, torch.float64).base.dense()
    lora = peers.lora_tensors(module)
    oracle = peers.peft_lora_reference(x.double(), exact, {name: t.double() for name, t in lora.items()}, 2.0)
    plain = peers.peft_lora_reference(x, weights.base.dense(), lora, 2.0)
    assert within_budget(relative_error(module(x), oracle), relative_error(plain, oracle), torch.bfloat16)


def test_peft_lora_draws_from_its_generator():
    """The same seed has to give the same problem on every machine."""
    weights, _, _ = problem(1)
    drawn = [
        peers.lora_tensors(peers.peft_lora(llama(weights.base), RANK, 6, torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


def assert_shares(module: nn.Module, mlp: LlamaMLP, use: Callable[[nn.Module], object]) -> None:
    """``module`` reads the memory of ``mlp``, and ``use`` of it changes nothing of ``mlp``."""
    modules = list(mlp.modules())
    use(module)
    module.eval()
    stored = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert {p.untyped_storage().data_ptr() for p in mlp.parameters()} <= stored
    assert list(mlp.modules()) == modules
    assert all(m.training for m in modules)
    assert all(p.requires_grad and p.grad is None for p in mlp.parameters())


def test_peft_lora_shares_the_mlp_and_leaves_it_alone():
    """A copy would not fit at 8B sizes; a change would reach every other provider of the same MLP."""
    weights, x, _ = problem(1)
    mlp = llama(weights.base)
    before = mlp(x)
    assert_shares(peers.peft_lora(mlp, RANK, 6), mlp, lambda module: module(x).sum().backward())
    assert torch.equal(mlp(x), before)


def test_liger_shares_the_mlp_and_leaves_it_alone(monkeypatch):
    """As for LoRA; to be built it needs no GPU."""
    if missing := peers.liger_missing(CUDA):
        pytest.skip(missing)
    monkeypatch.setattr(peers, "liger_missing", lambda device: None)
    mlp = llama(problem(1)[0].base)
    assert_shares(peers.liger_mlp(mlp), mlp, lambda module: None)


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


PACKAGES = {
    "mixlora": (peers.mixlora_missing, lambda mlp, weights: peers.mixlora_package(mlp, weights, SPEC)),
    "liger_kernel": (lambda: peers.liger_missing(CUDA), lambda mlp, weights: peers.liger_mlp(mlp)),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named(package, monkeypatch):
    """A provider that cannot run has to say what to install, and must not be replaced by another in silence."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    missing, prepare = PACKAGES[package]
    weights, _, _ = problem(1)
    with pytest.raises(RuntimeError) as raised:
        prepare(llama(weights.base), weights)
    reason = f"{package} is not installed (pip install {package.replace('_', '-')})"
    assert missing() == str(raised.value) == reason


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_cannot_be_imported_says_why(package, monkeypatch):
    """Its own version check, an assert on import, is the answer to why there is no time for it."""

    def refuse(name):
        raise AssertionError("requires transformers>=99")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", refuse)
    missing, _ = PACKAGES[package]
    assert missing() == f"{package} cannot be imported: AssertionError: requires transformers>=99"


def test_liger_needs_a_cuda_device(monkeypatch):
    """Installed or not, it must not be offered on a CPU."""
    monkeypatch.setattr(peers, "_import_error", lambda *names: None)
    assert peers.liger_missing(torch.device("cpu")) == "Liger-Kernel runs on CUDA devices, this is cpu"
    assert peers.liger_missing(torch.device("cuda", 0)) is None


def test_peers_are_built_from_llamas_mlp():
    """Another MLP has other projections; wrapping it would give a module that computes something else."""
    for build in (lambda mlp: peers.peft_lora(mlp, RANK, 6), peers.liger_mlp):
        with pytest.raises(TypeError, match="from a transformers LlamaMLP, got Linear"):
            build(nn.Linear(D, D))
