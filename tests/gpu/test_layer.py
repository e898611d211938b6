"""The layer on the Triton kernels: right in every dtype, by `backend="auto"`, compiled, and the same at every run."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sizes import METHODS
from graphmoe_kernels.launching import recorded
from tests.gpu.layers import MARKS, make, step

pytestmark = MARKS


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_layer_keeps_the_budget(dtype, rounds):
    """Decode and prefill, output and every gradient, against fp64; the same check that lets a layer be timed."""
    layer = make(rounds=rounds, dtype=dtype)
    for tokens in (16, 65, 700):
        x, rows = layer.input(tokens)
        for training in (False, True):
            found = layer.check(layer.fused, layer.fused, x, rows, training)
            assert found.fault is None, f"{tokens} tokens, training={training}: {found.fault}"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_single_tokens_keep_the_budget(dtype, rounds):
    """Sixteen calls of one token each; every tensor's errors of all calls together, against the plain computation's."""
    layer = make(rounds=rounds, dtype=dtype)
    tokens, _ = layer.input(16)
    for training in (False, True):
        found = layer.check_single_tokens(layer.fused, layer.fused, tokens, training)
        assert found.fault is None, f"training={training}: {found.fault}"


@pytest.mark.methods
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_budget(method, dora):
    """At the papers' ranks in bf16, as the models run: experts chosen, mixed and single, each with DoRA's vectors."""
    layer = make(**{"rounds": 3, "dtype": "bf16", **METHODS[method], "dora": dora})
    singles, _ = layer.input(16)
    for training in (False, True):
        found = layer.check_single_tokens(layer.fused, layer.fused, singles, training)
        assert found.fault is None, f"single tokens, training={training}: {found.fault}"
        for tokens in (65, 700):
            x, rows = layer.input(tokens)
            found = layer.check(layer.fused, layer.fused, x, rows, training)
            assert found.fault is None, f"{tokens} tokens, training={training}: {found.fault}"


@pytest.mark.parametrize(
    ("tokens", "kernel", "per_round"),
    # 300 tokens are too few for tiles of pairs of experts, and enough for a launch of each slot
    [
        (1, "experts_forward_token", 1),
        (64, "experts_forward", 1),
        (300, "experts_stream", 2),
        (700, "experts_stream", 1),
    ],
)
def test_auto_is_triton(tokens, kernel, per_round):
    """On a CUDA device nothing has to be chosen: the kernels run, and give bit for bit what "triton" gives."""
    layer = make(rounds=3, dtype="bf16")
    x, _ = layer.input(tokens)
    automatic = layer.sharing("auto", "auto").eval()
    with torch.no_grad():
        automatic(x)  # compiles
        with recorded() as launches:
            found = automatic(x)
        assert torch.equal(found, layer.fused.eval()(x))
    names = [each.name for each in launches]
    assert [names.count(name) for name in ("routing_forward", kernel, "gru_forward")] == [3, 3 * per_round, 2]


def test_fp64_goes_to_pytorch():
    """The kernels do not compute in it; the layer still does."""
    layer = make(rounds=2, dtype="fp64")
    x, rows = layer.input(5)
    ffn = layer.sharing("auto", "auto")
    found = layer.check(ffn, ffn, x, rows, training=True)
    assert found.fault is None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_two_runs_are_bit_equal(dtype):
    """No atomics, no order of programs: the same input gives the same output and the same gradients."""
    layer = make(rounds=3, dtype=dtype)
    x, _ = layer.input(700)
    upstream = torch.randn_like(x)
    layer.fused.train()
    first, again = (step(layer, layer.fused, x, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_inductor_compiles_the_layer_whole(training):
    """fullgraph=True: no break at a kernel; the compiled layer keeps the same budget, forward and backward."""
    torch._dynamo.reset()
    layer = make(rounds=2, dtype="bf16")
    compiled = torch.compile(layer.fused, fullgraph=True)
    for tokens in (16, 300):
        x, rows = layer.input(tokens)
        found = layer.check(compiled, layer.fused, x, rows, training)
        assert found.fault is None, f"{tokens} tokens: {found.fault}"
