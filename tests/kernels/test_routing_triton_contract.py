"""The Triton backend of routing as an operator: launches, autocast, registration, compilation, and every refusal."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from graphmoe_kernels import route_tokens
from graphmoe_kernels.routing import launch
from graphmoe_kernels.testing import SLACK, relative_error
from tests.kernels.routing_operands import DEVICE, arguments, run
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS


@pytest.mark.parametrize("tokens", [1, 16, 17, 130])
def test_tickets_are_zero(tokens):
    """The counters of the kernels that follow: one for 16 tokens, all zero."""
    given = arguments(tokens, 40, 4, offset=False)
    tickets = route_tokens(given["x"], given["router"], 2, backend="triton").tickets
    assert torch.equal(tickets, torch.zeros(-(-tokens // 16), dtype=torch.int32, device=DEVICE))
    assert route_tokens(given["x"], given["router"], 2, backend="torch").tickets.numel() == 0


class Allocations(TorchDispatchMode):
    """Lets empty tensors be made and nothing be computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "empty" in func.name(), f"{func.name()} ran beside the kernel"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_x", [True, False])
def test_one_launch_and_nothing_else(with_x, monkeypatch):
    """The layer's count of launches rests on it: no cast, no fill, no second kernel without statistics."""
    launched = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *args, **options: launched.append(kernel))
    given = arguments(130, 40, 4, torch.bfloat16)
    if not with_x:
        given |= {"x": None, "router": None}
    with Allocations():
        launch.forward(*given.values(), None, 2, True, None)
    assert len(launched) == 1


def test_autocast_changes_nothing():
    """The router runs in fp32 whatever autocast says, forward and backward."""
    given = arguments(20, 40, 4)
    expected = run(given, 2, statistics="full", backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(given, 2, statistics="full", backend="triton")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_that_are_asked_for_alone():
    """A frozen input gets no gradient, and the others' do not change for it."""
    given = arguments(20, 40, 4)
    found = run(given, 2, ("routing_weights",), backend="triton")
    for name in given:
        leaves = {key: t.clone().requires_grad_(key == name) for key, t in given.items()}
        weights = route_tokens(
            leaves["x"], leaves["router"], 2, offset=leaves["offset"], backend="triton"
        ).routing_weights
        generator = torch.Generator().manual_seed(0)
        weights.backward(torch.randn(20, 2, generator=generator, dtype=torch.float64).to(weights))
        assert [key for key, t in leaves.items() if t.grad is not None] == [name]
        assert torch.equal(leaves[name].grad, found[f"d_{name}"])


@pytest.mark.parametrize("statistics", [None, "topk"])
def test_opcheck(statistics):
    """Schema, fake tensors and autograd of the operators agree with what they do."""
    given = {name: t.requires_grad_() for name, t in arguments(17, 40, 4).items()}
    mask = torch.rand(17, device=DEVICE) < 0.5
    ops = torch.ops.graphmoe
    torch.library.opcheck(ops.route, (*given.values(), mask, 2, True, statistics))
    torch.library.opcheck(ops.route, (None, None, given["offset"], None, 2, False, statistics))
    logits, weights, experts, *_ = ops.route(*given.values(), None, 2, True, None)
    d_mass = None if statistics is None else torch.randn(4, device=DEVICE)
    upstream = (torch.randn_like(logits), torch.randn_like(weights), d_mass)
    torch.library.opcheck(ops.route_backward, (*upstream, logits.detach(), experts, mask, True, statistics))
    torch.library.opcheck(ops.expert_order, (experts,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    """Forward and backward without a graph break; with dynamic sizes one graph serves every token count."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, router, offset, mask):
        found = route_tokens(x, router, 2, offset=offset, statistics="topk", token_mask=mask, backend="triton")
        return (found.routing_weights * found.routing_weights).sum() + found.probability_sums[0] + (
            found.logits * 0.1
        ).sum(), found.tickets

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for tokens in (20, 35) if dynamic else (20,):
        given = {name: t.requires_grad_() for name, t in arguments(tokens, 40, 4, torch.bfloat16).items()}
        mask = torch.rand(tokens, device=DEVICE) < 0.5
        (expected, tickets), (found, found_tickets) = (f(*given.values(), mask) for f in (step, compiled))
        assert torch.equal(found, expected)
        assert torch.equal(found_tickets, tickets)
        grads = (torch.autograd.grad(loss, list(given.values())) for loss in (expected, found))
        for expected_grad, grad in zip(*grads, strict=True):
            torch.testing.assert_close(grad, expected_grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_other_backends_compute_the_product_in_fp32(backend):
    """Off Triton too, half-precision states give fp32 logits, and fp64 stays fp64."""
    if backend == "auto" and DEVICE == "cuda":
        pytest.skip("auto is Triton on a GPU, which the tests above cover")
    given = arguments(12, 40, 4, torch.bfloat16)
    found = route_tokens(given["x"], given["router"], 2, offset=given["offset"], backend=backend)
    exact = given["x"].double() @ given["router"].double().T + given["offset"].double()
    assert found.logits.dtype == found.routing_weights.dtype == torch.float32
    assert relative_error(found.logits, exact) <= 2 * SLACK[torch.float32]
    assert route_tokens(given["x"].double(), given["router"], 2, backend=backend).logits.dtype == torch.float64


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, ValueError, "x is torch.float64: the Triton kernels take"),
        ({"x": torch.zeros(3, 2, 4)}, ValueError, r"x must be \[tokens, hidden\].*\(3, 2, 4\); flatten"),
        ({"router": torch.zeros(5, 4, dtype=torch.long)}, TypeError, "router must be floating point.*int64"),
        ({"router": torch.zeros(5)}, ValueError, r"router must be \[experts, hidden\]"),
        ({"router": torch.zeros(5, 3)}, ValueError, r"router must be \[experts, 4\].*\(5, 3\)"),
        ({"router": torch.zeros(5, 4, device="meta")}, ValueError, "router is on meta, x on"),
        ({"router": torch.zeros(300, 4)}, ValueError, "300 experts: the Triton kernels route up to 256; use fewer or"),
        ({"offset": torch.zeros(3, 4)}, ValueError, r"offset must be \[3, 5\], got shape \(3, 4\)"),
        ({"offset": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "offset must be floating point.*int32"),
        ({"offset": torch.zeros(3, 5, device="meta")}, ValueError, "offset is on meta, x on"),
        ({"top_k": 6}, ValueError, r"top_k must lie in 1\.\.5 .*got 6"),
        ({"statistics": "all"}, ValueError, "unknown statistics 'all'"),
        ({"token_mask": torch.ones(2)}, ValueError, r"token_mask must be \[3\], got shape \(2,\)"),
        ({"token_mask": torch.ones(3, device="meta").bool()}, ValueError, "token_mask is on meta, x on"),
    ],
)
def test_refusals_name_argument_and_expectation(change, error, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    given = {"x": torch.zeros(3, 4), "router": torch.zeros(5, 4), "offset": None, "token_mask": None}
    given |= {"top_k": 2, "statistics": "topk"} | change
    on_device = {
        name: t.to(DEVICE) if isinstance(t, torch.Tensor) and t.device.type != "meta" else t
        for name, t in given.items()
    }
    with pytest.raises(error, match=message):
        route_tokens(**on_device, backend="triton")
