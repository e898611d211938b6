"""torch.compile of the layer: one graph without breaks, right for every token count, never a stale fold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig

HIDDEN = 32
TOLERANCE = 1e-10  # fp64; the router runs in fp32 only for models of lower precision


def make_ffn(**options: object) -> FusedGraphMoEFFN:
    """A small layer in which every term counts."""
    settings = {"r": 4, "num_experts": 4, "rounds": 2, "gru_hidden_scale": 0.4, "lora_dropout": 0.0}
    mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=48))
    return FusedGraphMoEFFN(mlp, GraphMoEConfig(**{**settings, **options}, init_lora_weights=False)).double()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fold", ["always", "never"])
def test_training_compiles_to_one_graph_with_equal_gradients(fold: str) -> None:
    ffn = make_ffn(fold=fold).train()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    x, upstream = tokens(2, 5), tokens(2, 5)
    parameters = [p for p in ffn.parameters() if p.requires_grad]
    results = []
    for run in (ffn, compiled):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *parameters], upstream)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=0, atol=TOLERANCE)


def test_dropout_compiles_without_a_break() -> None:
    ffn = make_ffn(fold="always", lora_dropout=0.2).train()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    x = tokens(2, 5)
    torch.manual_seed(7)
    eager = ffn(x)
    torch.manual_seed(7)
    torch.testing.assert_close(compiled(x), eager, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_token_counts_share_a_handful_of_graphs() -> None:
    """Static for the first count, dynamic from the second on, one more for a single token."""
    ffn = make_ffn().eval()
    ffn(tokens(2, 5))  # keeps a fold; graphs that are made before there is one are tested below
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter)
    for length in (5, 5, 6, 7, 1, 12, 1, 33):
        x = tokens(2, length)
        torch.testing.assert_close(compiled(x), ffn(x), rtol=0, atol=TOLERANCE)
    assert counter.frame_count <= 3


def _change_in_place(ffn: FusedGraphMoEFFN) -> None:
    ffn.lora_graphmoe["default"].gru.output_proj.weight.mul_(3)


def _change_data_then_eval(ffn: FusedGraphMoEFFN) -> None:
    ffn.lora_graphmoe["default"].gru.update_gate.weight.data.mul_(3)
    ffn.eval()


def _change_data_then_refold(ffn: FusedGraphMoEFFN) -> None:
    ffn.lora_graphmoe["default"].gru.candidate.weight.data.mul_(3)
    ffn.refold()


def _load_state_dict(ffn: FusedGraphMoEFFN) -> None:
    ffn.load_state_dict({name: 1.5 * tensor for name, tensor in ffn.state_dict().items()})


def _replace_base_weight(ffn: FusedGraphMoEFFN) -> None:
    ffn.base_layer.up_proj.weight = nn.Parameter(torch.randn(48, HIDDEN).double(), requires_grad=False)


def _change_expert_in_place(ffn: FusedGraphMoEFFN) -> None:
    ffn.lora_graphmoe["default"].experts.gate_proj.B.mul_(3)


def _change_expert_data_then_eval(ffn: FusedGraphMoEFFN) -> None:
    ffn.lora_graphmoe["default"].experts.down_proj.A.data.mul_(3)
    ffn.eval()


def _replace_expert(ffn: FusedGraphMoEFFN) -> None:
    up = ffn.lora_graphmoe["default"].experts.up_proj
    up.B = nn.Parameter(-2 * up.B)


ANY_ROUNDS = (
    _change_expert_in_place,
    _change_expert_data_then_eval,
    _replace_expert,
    _load_state_dict,
    _replace_base_weight,
)
CHANGES = {
    1: ANY_ROUNDS,
    2: (_change_in_place, _change_data_then_eval, _change_data_then_refold, *ANY_ROUNDS),
}


@pytest.mark.parametrize("rounds", CHANGES)
@torch.no_grad()
def test_compiled_inference_never_uses_a_stale_fold(rounds: int) -> None:
    """Every change of a weight is seen by the compiled graph, one after another on one layer; in one round too, where
    the experts alone are kept."""
    ffn = make_ffn(rounds=rounds).eval()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    x = tokens(2, 5)
    for _ in range(3):
        before = compiled(x)
    for change in CHANGES[rounds]:
        change(ffn)
        fresh = copy.deepcopy(ffn)(x)
        assert not torch.allclose(fresh, before), change.__name__
        before = compiled(x)
        torch.testing.assert_close(before, fresh, rtol=0, atol=TOLERANCE, msg=change.__name__)


@torch.no_grad()
def test_layers_compiled_one_by_one_share_graphs() -> None:
    """Regional compilation: many layers of one shape must not each cost a compilation; Dynamo alone decides that."""
    layers = [make_ffn().eval() for _ in range(4)]
    counter = CompileCounterWithBackend("eager")
    x = tokens(2, 5)
    for _ in range(3):
        for ffn in layers:
            compiled = torch.compile(ffn, fullgraph=True, backend=counter)
            torch.testing.assert_close(compiled(x), copy.deepcopy(ffn)(x), rtol=0, atol=TOLERANCE)
    assert counter.frame_count <= 4


@torch.no_grad()
def test_switching_between_training_and_evaluation_compiles_each_once() -> None:
    """Each mode keeps its graph; Dynamo alone decides that, so no backend lowers them."""
    ffn = make_ffn()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(ffn, fullgraph=True, backend=counter)
    x = tokens(2, 5)
    counts = []
    for _ in range(4):
        ffn.train()
        compiled(x)
        ffn.eval()
        compiled(x)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1]
