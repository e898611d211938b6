"""CUDA graphs of the layer's forward: replayed on other inputs and on changed weights they give what eager gives."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sizes import METHODS
from graphmoe_kernels import rethink_folded
from graphmoe_kernels.structures import map_tensors
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


def test_replays_of_changed_weights_have_the_old_fold():
    """Documented: until the layer runs eagerly, a replay reads the weights as they are and the fold as it was."""
    layer = make(rounds=3, dtype="bf16")
    ffn = layer.fused.eval()
    x, _ = layer.input(16)
    graph, y = captured(ffn, x)
    graph.replay()
    before, old = y.clone(), map_tensors(torch.clone, ffn._folds["default"].fold)
    with torch.no_grad():
        for parameter in (*layer.leaves().values(), ffn.base_layer.up_proj.weight):
            parameter.mul_(1.25)
        adapter = ffn.lora_graphmoe["default"]
        spec = adapter.config.spec(ffn.scaling["default"], adapter.num_experts, ffn.traits.activation, training=False)
        mixed = rethink_folded(x, ffn._weights("default"), spec, "triton", old).y
        graph.replay()
        assert torch.equal(y, mixed)
        expected = layer.sharing("auto", "triton").eval()(x)
    assert not torch.equal(y, before)
    assert not torch.equal(y, expected)


def autocast_forward(ffn, x):
    """Another compute dtype: the layer keeps another fold."""
    with torch.autocast("cuda", torch.float16), torch.no_grad():
        ffn(x)


def test_graphs_replayed_on_two_streams_beside_an_eager_call():
    """Launches that run at once share no counter: each of them sums its splits when all of its own have come."""
    layer = make(rounds=3, dtype="bf16")
    ffn = layer.fused.eval()
    inputs = [layer.input(16, seed=seed)[0] for seed in (1, 2, 3)]
    with torch.no_grad():
        expected = [ffn(x) for x in inputs]
    graphs = [captured(ffn, x) for x in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, (graph, y) in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                y.fill_(float("nan"))
                graph.replay()
        with torch.cuda.stream(streams[2]), torch.no_grad():
            eager = ffn(inputs[2])
        torch.cuda.synchronize()
        for found, exact in zip((*(y for _, y in graphs), eager), expected, strict=True):
            assert torch.equal(found, exact)


LETTING_GO = {
    "refold()": lambda ffn, _: ffn.refold(),
    "train()": lambda ffn, _: ffn.train(),
    "eval()": lambda ffn, _: ffn.eval(),
    "autocast": autocast_forward,
}


@pytest.mark.parametrize("let_go", LETTING_GO.values(), ids=LETTING_GO)
def test_a_captured_fold_stays_in_memory(let_go):
    """Whatever lets go of the fold must leave the memory that a graph reads: no new tensor, of NaN, may lie there."""
    layer = make(rounds=3, dtype="bf16")
    ffn = layer.fused.eval()
    x, _ = layer.input(16)
    with torch.no_grad():
        ffn(x)  # the fold in the default stream's memory, as what is allocated below
    graph, y = captured(ffn, x)
    graph.replay()
    before = y.clone()
    shapes = [(t.shape, t.dtype) for t in ffn._folds["default"].fold.tensors()]
    let_go(ffn, x)
    poison = [torch.full(shape, torch.nan, dtype=dtype, device=x.device) for shape, dtype in shapes for _ in range(3)]
    y.zero_()
    graph.replay()
    assert torch.equal(y, before)
    del poison


def test_replays_follow_a_refold():
    """After refold() the next eager call fills the captured fold anew, at its address."""
    layer = make(rounds=3, dtype="bf16")
    ffn = layer.fused.eval()
    x, _ = layer.input(16)
    graph, y = captured(ffn, x)
    graph.replay()
    before = y.clone()
    layer.adapter.experts.down_proj.B.data.mul_(2)  # seen by nothing but a refold
    ffn.refold()
    with torch.no_grad():
        expected = ffn(x)
    graph.replay()
    assert torch.equal(y, expected)
    assert not torch.equal(y, before)
