"""The kernel's operators against their plain definitions, on the CPU and on a GPU alike."""

import kernels
import pytest
import torch

graphmoe = kernels.get_kernel("$repo_id", version=int("$version"))

TOKENS, EXPERTS, TOP_K, RANK, WIDTH, GRU = 33, 8, 2, 4, 48, 16


def assert_close(found, expected):
    """Compare tensors, or tuples of them, in fp32, whose products a GPU may round to TF32."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def draw(device, *shape):
    """Draw a tensor that wants a gradient."""
    return (0.5 * torch.randn(shape, device=device)).requires_grad_()


def expert_inputs(device):
    """Draw what `expert_swiglu` reads, as a list of tensors."""
    wide, B = (TOKENS, WIDTH), (EXPERTS, WIDTH, RANK)
    shapes = (wide, wide, (TOKENS, 2 * EXPERTS * RANK), B, B, (EXPERTS, RANK, WIDTH))
    routing = graphmoe.topk_softmax_routing(torch.randn(TOKENS, EXPERTS, device=device), TOP_K)
    return [*(draw(device, *shape) for shape in shapes), *routing[:2]]


def run_experts(inputs, **options):
    """Call `expert_swiglu` on the tensors of `expert_inputs`."""
    gate, up, low, gate_B, up_B, down_A, weights, ids = inputs
    pairs = graphmoe.GateUp(gate, up), graphmoe.GateUp(gate_B, up_B)
    operands = graphmoe.ExpertOperands(pairs[0], low, pairs[1], down_A, weights, ids)
    return torch.cat(graphmoe.expert_swiglu(operands, scale=2.0, **options), dim=1)


def gru_inputs(device):
    """Draw what `gru_step` reads in a later round."""
    shapes = [(TOKENS, 3 * GRU), (TOKENS, 2 * GRU), (TOKENS, GRU), (TOKENS, GRU), (GRU, GRU), (GRU,)]
    return [draw(device, *shape) for shape in shapes]


def assert_same(run, inputs, **reference):
    """Compare the outputs and the gradients of ``run`` with those that it has with the options ``reference``."""
    learned = [x for x in inputs if x.requires_grad]
    found, expected = run(inputs), run(inputs, **reference)
    assert_close(found, expected)
    upstream = torch.randn_like(found)
    gradients = (torch.autograd.grad(out, learned, upstream) for out in (found, expected))
    assert_close(*gradients)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("normalize", [True, False])
def test_routing(device, normalize):
    """Weights are the largest probabilities, and expert ids say whose."""
    logits = torch.randn(TOKENS, EXPERTS, device=device)
    found = graphmoe.topk_softmax_routing(logits, TOP_K, normalize=normalize)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(found.routing_weights, weights)
    assert torch.equal(found.expert_ids.long().sort().values, ids.sort().values)


@pytest.mark.kernels_ci
def test_experts(device):
    """Outputs and gradients are those of the loop over slots."""
    assert_same(run_experts, expert_inputs(device), backend="reference")


@pytest.mark.kernels_ci
def test_gru_step(device):
    """Outputs and gradients are those of the equations."""
    assert_same(lambda x, **options: graphmoe.gru_step(*x, **options), gru_inputs(device), backend="reference")


@pytest.mark.kernels_ci
def test_half_precision(device):
    """Operators take bf16, and give it back."""
    inputs = [x.detach().bfloat16() if x.is_floating_point() else x for x in expert_inputs(device)]
    found = run_experts(inputs)
    assert found.dtype == torch.bfloat16
    expected = run_experts([x.float() if x.is_floating_point() else x for x in inputs])
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.kernels_ci
def test_compiles_without_breaks(device):
    """An operator is one node of a compiled graph; with gradients, so that it is the registered one."""
    inputs = expert_inputs(device)
    compiled = torch.compile(run_experts, fullgraph=True, backend="aot_eager")
    assert_close(compiled(inputs), run_experts(inputs))


@pytest.mark.kernels_ci
def test_operators_have_the_namespace_of_this_build():
    """What another version registers has other names."""
    assert hasattr(getattr(torch.ops, graphmoe.__name__), "expert_swiglu")


@pytest.mark.kernels_ci
def test_wrong_inputs_are_refused(device):
    """Errors say which argument is wrong."""
    with pytest.raises(ValueError, match="top_k"):
        graphmoe.topk_softmax_routing(torch.randn(TOKENS, EXPERTS, device=device), EXPERTS + 1)
