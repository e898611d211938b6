"""The PyTorch path on a CUDA device, against the fp64 oracle on the CPU: `pytest -m gpu`."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from graphmoe_kernels import (
    Dropout,
    ExpertOperands,
    GateUp,
    RethinkingSpec,
    expert_swiglu,
    rethink_folded,
    rethink_literal,
    rethink_reference,
)
from graphmoe_kernels.testing import cast_layer, relative_error, within_budget
from graphmoe_model import FusedGraphMoEFFN, GraphMoEConfig
from tests.kernels.cases import Sizes, decided_tokens, errors, gradients, layer, rounded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = Sizes(hidden=64, intermediate=176, experts=8, rank=16, width=26)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounds", [1, 3])
def test_folded_keeps_the_budget_on_cuda(dtype: torch.dtype, rounds: int) -> None:
    """Output and every gradient; in fp64 the folded form equals Algorithm 1 as it does on the CPU."""
    spec = RethinkingSpec(rounds, 2, 1.5)
    weights = rounded(layer(spec, SIZES), dtype)
    x = torch.randn(96, SIZES.hidden, dtype=torch.float64).to(dtype).double()
    keep = decided_tokens(x, weights, spec, margin=0.05)
    x = x[keep]
    upstream = torch.randn(x.shape, dtype=torch.float64)
    exact = gradients(lambda a, w: rethink_reference(a, w, spec), x, weights, upstream)

    on_cuda = x.to("cuda", dtype), cast_layer(weights, dtype, "cuda"), upstream.to("cuda", dtype)
    folded = gradients(lambda a, w: rethink_folded(a, w, spec, backend="torch").y, *on_cuda)
    literal = gradients(lambda a, w: rethink_literal(a, w, spec, backend="reference").y, *on_cuda)
    mine, own = (errors({n: t.cpu() for n, t in found.items()}, exact, upstream) for found in (folded, literal))
    for name in exact:
        assert within_budget(mine[name], own[name], dtype), f"{name}: {mine[name]:.2e}, literal {own[name]:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_moved_to_cuda_computes_what_it_did_on_the_cpu(dtype: torch.dtype) -> None:
    """The kept fold does not survive the move, and routing statistics come along."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=176))
    ffn = (
        FusedGraphMoEFFN(mlp, GraphMoEConfig(init_lora_weights=False, lora_dropout=0.0, backend="torch"))
        .to(dtype)
        .eval()
    )
    x = torch.randn(2, 33, 64, dtype=dtype)
    with torch.no_grad():
        expected = ffn(x)
        exact = copy.deepcopy(ffn).double()(x.double())
        moved = ffn.to("cuda")(x.cuda())
    per_token = (moved.cpu().double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    own = (expected.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    flipped = per_token > 2 * own.median() + 0.02  # a token whose routing is within rounding may choose otherwise
    assert flipped.float().mean() < 0.1
    assert relative_error(moved[~flipped.to(moved.device)], exact[~flipped]) < 2 * own.max() + 1e-4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dropout_masks_on_cuda_are_those_of_the_reference(backend: str) -> None:
    """The down branch's mask comes from a seed, not from the device's generator."""
    tokens, width, n, r, k = 20, 48, 4, 4, 2
    arguments = [torch.randn(*s) for s in ((tokens, width), (tokens, width), (tokens, 2 * n * r))]
    arguments += [torch.randn(*s) for s in ((n, width, r), (n, width, r), (n, r, width))]
    arguments += [torch.rand(tokens, k), torch.stack([torch.randperm(n)[:k] for _ in range(tokens)])]
    seed = torch.tensor([5])

    def run(tensors, seed, backend):
        gate, up, low, gate_B, up_B, *rest = tensors
        operands = ExpertOperands(GateUp(gate, up), low, GateUp(gate_B, up_B), *rest, dropout=Dropout(0.5, seed))
        return expert_swiglu(operands, scale=1.0, backend=backend)

    on_cpu = run(arguments, seed, "reference")
    on_cuda = run([a.cuda() for a in arguments], seed.cuda(), backend)
    for a, b in zip(on_cpu, on_cuda, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)
