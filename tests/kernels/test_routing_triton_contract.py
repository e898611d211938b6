"""The Triton backend of routing as an operator: launches, autocast, registration, compilation, and every refusal."""

from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from graphmoe_kernels import route_tokens
from graphmoe_kernels.aot.trace import traced
from graphmoe_kernels.launching import recorded, stubbed
from graphmoe_kernels.routing import run
from graphmoe_kernels.routing.triton import launch
from graphmoe_kernels.testing import SLACK, relative_error
from tests.kernels.routing_operands import DEVICE, arguments
from tests.kernels.routing_operands import run as route
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS


class Allocations(TorchDispatchMode):
    """Lets empty tensors be made and nothing be computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "empty" in func.name(), f"{func.name()} ran beside the kernel"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("offset", [True, False])
def test_one_launch_and_nothing_else(offset):
    """The layer's count of launches rests on it: no cast, no fill, no second kernel without statistics."""
    given = arguments(130, 40, 4, torch.bfloat16, offset=offset)
    with torch.no_grad(), Allocations(), recorded() as launches, stubbed():
        launch.route(*given.values(), 2, True)
    assert [each.name for each in launches] == ["routing_forward"]


def test_given_logits_are_one_launch():
    """fp32 logits are read as they are: the router losses' operator costs one kernel."""
    logits = torch.randn(130, 4, device=DEVICE)
    with torch.no_grad(), Allocations(), recorded() as launches, stubbed():
        launch.topk_softmax(logits, 2, True)
    assert [each.name for each in launches] == ["routing_topk"]


def test_a_layer_skips_the_registered_operator_where_nobody_looks():
    """Registration costs more host time than the launch: without gradients and modes the kernel is called as it is."""
    given = arguments(20, 40, 4)
    seen = []
    with patch.object(run, "route_op", lambda *a: seen.append(a) or run.launch.route(*a)):
        with torch.no_grad():
            direct = run.run_routing(given["x"], given["router"], 2, offset=given["offset"], backend="triton")
        assert seen == []
        given["x"].requires_grad_()
        run.run_routing(given["x"], given["router"], 2, offset=given["offset"], backend="triton")
    assert len(seen) == 1
    public = route_tokens(given["x"], given["router"], 2, offset=given["offset"], backend="triton")
    for name in ("routing_weights", "expert_ids", "logits"):
        assert torch.equal(getattr(direct, name), getattr(public, name))


def test_autocast_changes_nothing():
    """The router runs in fp32 whatever autocast says, forward and backward."""
    given = arguments(20, 40, 4)
    expected = route(given, 2, statistics="full", backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = route(given, 2, statistics="full", backend="triton")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_that_are_asked_for_alone():
    """A frozen input gets no gradient, and the others' do not change for it."""
    given = arguments(20, 40, 4)
    found = route(given, 2, ("routing_weights",), backend="triton")
    for name in given:
        leaves = {key: t.clone().requires_grad_(key == name) for key, t in given.items()}
        weights = route_tokens(
            leaves["x"], leaves["router"], 2, offset=leaves["offset"], backend="triton"
        ).routing_weights
        generator = torch.Generator().manual_seed(0)
        weights.backward(torch.randn(20, 2, generator=generator, dtype=torch.float64).to(weights))
        assert [key for key, t in leaves.items() if t.grad is not None] == [name]
        assert torch.equal(leaves[name].grad, found[f"d_{name}"])


@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck(normalize):
    """Schemas, fake tensors and autograd of the operators agree with what they do."""
    given = {name: t.requires_grad_() for name, t in arguments(17, 40, 4).items()}
    ops = torch.ops.graphmoe
    torch.library.opcheck(ops.route, (*given.values(), 2, normalize))
    torch.library.opcheck(ops.route, (given["x"], given["router"], None, 2, normalize))
    torch.library.opcheck(ops.topk_softmax, (given["offset"], 2, normalize))
    logits, weights, experts = (t.detach() for t in ops.route(*given.values(), 2, normalize))
    x, router = given["x"].detach(), given["router"].detach()
    d_weights, d_logits = torch.randn_like(weights), torch.randn_like(logits)
    for upstream, wanted in (
        ((d_weights, None), (x, router)),
        ((d_weights, d_logits), (None, router)),
        ((None, d_logits), (x, None)),
    ):
        settings = (normalize, x.dtype, d_weights is upstream[0])
        torch.library.opcheck(ops.routing_backward, (*upstream, logits, experts, *wanted, *settings))


# Gradients that arrive; inputs that need one; launches. d_logits alone is all there is of the logits' gradient.
LAUNCHES = [
    ("routing_weights logits", "x router offset", ["routing_backward", "routing_backward_router", "sum"]),
    ("routing_weights", "x router", ["routing_backward", "routing_backward_router", "sum"]),
    ("routing_weights", "x", ["routing_backward"]),
    ("routing_weights", "router", ["routing_backward", "routing_backward_router", "sum"]),
    ("routing_weights", "offset", ["routing_backward"]),
    ("logits", "x router offset", ["routing_backward", "routing_backward_router", "sum"]),
    ("logits", "x", ["routing_backward"]),
    ("logits", "router", ["routing_backward_router", "sum"]),
    ("logits", "offset", []),
]


@pytest.mark.parametrize("upstream, wanted, expected", LAUNCHES)
def test_launches_of_a_backward(upstream, wanted, expected):
    """No more than is asked for, and no copy or cast of x: one launch for the logits' gradient and x's, one for the
    router's, and a sum where several programs share its tokens."""
    x = torch.empty(8192, 96, dtype=torch.bfloat16, device="meta")
    given = {"x": x, "router": torch.empty(8, 96, device="meta"), "offset": torch.empty(8192, 8, device="meta")}
    for name in wanted.split():
        given[name].requires_grad_()
    with traced("sm_90") as steps:
        found = dict(
            zip(("logits", "routing_weights"), torch.ops.graphmoe.route(*given.values(), 2, True), strict=False)
        )
        outputs = [found[name] for name in upstream.split()]
        grads = torch.autograd.grad(
            outputs, [given[name] for name in wanted.split()], [torch.empty_like(output) for output in outputs]
        )
    assert [step.name for step in steps] == ["routing_forward", *expected]
    for grad, name in zip(grads, wanted.split(), strict=True):
        assert (grad.shape, grad.dtype) == (given[name].shape, given[name].dtype)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    """Forward and backward without a graph break; with dynamic sizes one graph serves every token count."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, router, offset, mask):
        found = route_tokens(x, router, 2, offset=offset, statistics="topk", token_mask=mask, backend="triton")
        return (
            (found.routing_weights * found.routing_weights).sum()
            + found.probability_sums[0]
            + (found.logits * 0.1).sum()
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for tokens in (20, 35) if dynamic else (20,):
        given = {name: t.requires_grad_() for name, t in arguments(tokens, 40, 4, torch.bfloat16).items()}
        mask = torch.rand(tokens, device=DEVICE) < 0.5
        expected, found = (f(*given.values(), mask) for f in (step, compiled))
        assert torch.equal(found, expected)
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
        ({"x": torch.zeros(3, 2, 4)}, ValueError, r"x must be \[tokens, hidden\].*\[3, 2, 4\]; flatten"),
        ({"router": torch.zeros(5, 4, dtype=torch.long)}, TypeError, "router must be floating point.*int64"),
        ({"router": torch.zeros(5)}, ValueError, r"router must be \[experts, hidden\]"),
        ({"router": torch.zeros(5, 3)}, ValueError, r"router must be \[5, 4\] for .*width 4.*got \[5, 3\]"),
        ({"router": torch.zeros(5, 4, device="meta")}, ValueError, "router is on meta, x on"),
        ({"router": torch.zeros(300, 4)}, ValueError, "300 experts: the Triton kernels route up to 256; use fewer or"),
        ({"offset": torch.zeros(3, 4)}, ValueError, r"offset must be \[3, 5\] for .*; got \[3, 4\]"),
        ({"offset": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "offset must be floating point.*int32"),
        ({"offset": torch.zeros(3, 5, device="meta")}, ValueError, "offset is on meta, x on"),
        ({"top_k": 6}, ValueError, r"top_k must lie in 1\.\.5 .*got 6"),
        ({"statistics": "all"}, ValueError, "unknown statistics 'all'"),
        ({"token_mask": torch.ones(2)}, ValueError, r"token_mask must be \[3\], got \[2\]"),
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
