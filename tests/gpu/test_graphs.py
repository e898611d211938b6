"""CUDA graphs of the layer's forward: replayed on other inputs and on changed weights they give what eager gives."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sizes import METHODS
from tests.gpu.layers import MARKS, make

pytestmark = MARKS


def captured(ffn, x):
    """A graph of ``ffn`` on ``x``, and its output, which every replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(2):
            ffn(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = ffn(x)
    return graph, y


@pytest.mark.parametrize("tokens", [1, 16, 8192])
@pytest.mark.parametrize("rounds", [1, 3])
def test_replays_equal_eager(tokens, rounds):
    """Other values at the captured addresses: other routing, other tiles, other lists of experts; bit for bit."""
    layer = make(rounds=rounds, dtype="bf16")
    ffn = layer.fused.eval()
    static, _ = layer.input(tokens)
    graph, y = captured(ffn, static)
    for seed in (1, 2, 3):
        x, _ = layer.input(tokens, seed=seed)
        static.copy_(x)
        y.fill_(float("nan"))
        graph.replay()
        with torch.no_grad():
            expected = ffn(x)
        assert torch.equal(y, expected)


@pytest.mark.methods
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("method", METHODS)
def test_replays_of_every_method_equal_eager(method, dora):
    """No kind of experts waits for the device or allocates outside of the graph."""
    layer = make(**{"rounds": 3, "dtype": "bf16", **METHODS[method], "dora": dora})
    ffn = layer.fused.eval()
    static, _ = layer.input(16)
    graph, y = captured(ffn, static)
    x, _ = layer.input(16, seed=1)
    static.copy_(x)
    y.fill_(float("nan"))
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, ffn(x))


def test_replays_follow_changed_weights():
    """A weight written in place reaches the kept fold in place, at the next eager call: the graph reads the new one."""
    layer = make(rounds=3, dtype="bf16")
    ffn = layer.fused.eval()
    x, _ = layer.input(16)
    graph, y = captured(ffn, x)
    graph.replay()
    before = y.clone()
    with torch.no_grad():
        for parameter in layer.leaves().values():
            parameter.mul_(1.25)
        expected = ffn(x)
    graph.replay()
    assert torch.equal(y, expected)
    assert not torch.equal(y, before)


def test_a_graph_is_captured_anew_after_refold():
    """refold() lets the fold go, and with it the memory that a graph of before reads."""
    layer = make(rounds=3, dtype="bf16")
    ffn = layer.fused.eval()
    x, _ = layer.input(16)
    captured(ffn, x)
    layer.adapter.experts.down_proj.B.data.mul_(2)  # seen by nothing but a refold
    ffn.refold()
    graph, y = captured(ffn, x)
    graph.replay()
    with torch.no_grad():
        expected = layer.sharing("auto", "triton").eval()(x)
    assert torch.equal(y, expected)
