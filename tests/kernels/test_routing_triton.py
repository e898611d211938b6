"""The Triton backend of routing: product, choice, statistics and every gradient; the order of tokens by expert."""

from collections import defaultdict
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from graphmoe_kernels import expert_order, route_tokens, topk_softmax_routing
from graphmoe_kernels.routing import launch, order
from graphmoe_kernels.testing import SLACK, relative_error, within_budget
from tests.interpreter import grid_order

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, D, n, k: no and several full tiles of tokens and of the width, one expert, all of them, the most of both
SIZES = [
    *[(1, 40, 1, 1), (5, 40, 2, 1), (64, 72, 5, 2), (130, 200, 8, 2), (65, 64, 8, 8), (64, 130, 64, 2)],
    *[(5, 40, 256, 1), (5, 40, 256, 256)],
]


def arguments(tokens, width, experts, dtype=torch.float32, router_dtype=torch.float32, offset=True):
    """x, router and offset of logits that are neither flat nor peaked."""

    def draw(*shape, std, dtype):
        return (torch.randn(*shape, dtype=torch.float64) * std).to(DEVICE, dtype)

    return {
        "x": draw(tokens, width, std=1.0, dtype=dtype),
        "router": draw(experts, width, std=width**-0.5, dtype=router_dtype),
        "offset": draw(tokens, experts, std=1.0, dtype=torch.float32) if offset else None,
    }


def run(given, top_k, upstream=("logits", "weights", "mass"), dtype=None, seed=0, **settings):
    """What `route_tokens` gives, by name, with the inputs' gradients for random gradients of the ``upstream`` outputs.

    The gradients are drawn alike whatever the dtype and the backend; in ``dtype`` if it is given.
    """
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items()
    }
    found = route_tokens(leaves["x"], leaves["router"], top_k, offset=leaves["offset"], **settings)
    generator = torch.Generator().manual_seed(seed)
    outputs = {name: t for name, t in found._asdict().items() if name in upstream and t is not None}
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs.values()]
    torch.autograd.backward(list(outputs.values()), grads)
    results = {name: t.detach() for name, t in found._asdict().items() if t is not None and name != "tickets"}
    return results | {f"d_{name}": t.grad for name, t in leaves.items() if t is not None}


@pytest.mark.parametrize(
    "dtype, router_dtype",
    [*[(dtype, dtype) for dtype in DTYPES], *[(dtype, torch.float32) for dtype in DTYPES[1:]], (DTYPES[0], DTYPES[2])],
)
def test_values_and_gradients_are_within_budget(dtype, router_dtype):
    """All outputs and gradients, with every pair of statistics and normalisation, against fp64.

    The error is that of all sizes together: of a single number, the reference's own error is a matter of luck.
    """
    found, literal, exact = defaultdict(list), defaultdict(list), defaultdict(list)
    variants = list(product(["topk", "full"], [True, False], [True, False]))
    for i, (tokens, width, experts, top_k) in enumerate(SIZES):
        statistics, normalize, masked = variants[i % len(variants)]
        given = arguments(tokens, width, experts, dtype, router_dtype, offset=i % 3 > 0)
        mask = torch.rand(tokens, device=DEVICE) < 0.6 if masked else None
        settings = {"normalize": normalize, "statistics": statistics, "token_mask": mask}
        for results, backend, accumulate in (
            (found, "triton", None),
            (literal, "reference", None),
            (exact, "reference", torch.float64),
        ):
            for name, tensor in run(given, top_k, dtype=accumulate, backend=backend, **settings).items():
                results[name].append(tensor.flatten())
    for name in exact:
        value, reference, oracle = (torch.cat(results[name]) for results in (found, literal, exact))
        if name in ("experts", "counts"):
            assert torch.equal(value.double(), oracle.double()), name
            continue
        assert value.dtype == reference.dtype
        errors = relative_error(value, oracle), relative_error(reference, oracle)
        assert within_budget(*errors, value.dtype), (name, *errors)


@pytest.mark.parametrize("upstream", [("logits",), ("weights",), ("mass",), ("weights", "mass")])
@pytest.mark.parametrize("statistics", ["topk", "full"])
def test_gradients_that_arrive_alone(statistics, upstream):
    """An output without a gradient adds nothing, and nothing is read for it."""
    given = arguments(20, 48, 5)
    settings = {"statistics": statistics, "normalize": statistics == "topk"}
    found = run(given, 2, upstream, backend="triton", **settings)
    exact = run(given, 2, upstream, dtype=torch.float64, backend="reference", **settings)
    for name in ("d_x", "d_router", "d_offset"):
        assert relative_error(found[name], exact[name]) <= 10 * SLACK[torch.float32], name


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_logits(dtype):
    """Logits of any dtype are routed in fp32; in fp32 they are themselves `Routing.logits`."""
    logits = torch.randn(70, 6, device=DEVICE).to(dtype).requires_grad_()
    found = topk_softmax_routing(logits, 2, statistics="full", backend="triton")
    exact = topk_softmax_routing(logits.double(), 2, statistics="full")
    assert found.logits.dtype == torch.float32
    assert (found.logits is logits) == (dtype == torch.float32)
    assert torch.equal(found.logits.to(dtype), logits)
    assert relative_error(found.weights, exact.weights) <= SLACK[torch.float32]
    gradient = torch.randn(70, 2, device=DEVICE)
    (value,) = torch.autograd.grad(
        (found.weights * gradient).sum() + found.mass[1] + found.logits[:, 0].sum(), logits, retain_graph=True
    )
    (oracle,) = torch.autograd.grad((exact.weights * gradient).sum() + exact.mass[1] + exact.logits[:, 0].sum(), logits)
    assert value.dtype == dtype
    assert relative_error(value, oracle) <= 2 * SLACK[dtype]


def test_ties_choose_the_lower_index():
    """A router of zeros, and equal logits among others, choose the same experts on every machine and in every run."""
    found = topk_softmax_routing(torch.zeros(5, 7, device=DEVICE), 3, backend="triton")
    assert torch.equal(found.experts.cpu(), torch.arange(3, dtype=torch.int32).expand(5, 3))
    torch.testing.assert_close(found.weights.cpu(), torch.full((5, 3), 1 / 3))
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 2.0]], device=DEVICE)
    found = topk_softmax_routing(logits, 6, backend="triton")
    assert found.experts.tolist() == [[1, 3, 5, 2, 4, 0]]


@pytest.mark.parametrize("experts", [1, 8, 37])
def test_all_experts_are_the_softmax(experts):
    """k = n leaves nothing out: the weights are the softmax, in falling order, renormalised or not."""
    logits = torch.randn(9, experts, device=DEVICE)
    expected = logits.softmax(-1).sort(-1, descending=True).values
    for normalize in (True, False):
        found = topk_softmax_routing(logits, experts, normalize=normalize, backend="triton")
        torch.testing.assert_close(found.weights, expected, rtol=2e-6, atol=1e-7)
        assert all(sorted(row) == list(range(experts)) for row in found.experts.tolist())


@pytest.mark.parametrize("statistics", ["topk", "full"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_stays_out_of_the_statistics(statistics, mask_dtype):
    """Padding may hold NaN: no count, no mass and no gradient of a counted token comes from it."""
    given = arguments(37, 40, 5)
    mask = torch.rand(37, device=DEVICE) < 0.6
    broken = given | {"x": given["x"].masked_fill(~mask[:, None], float("nan"))}
    kept = {name: t if name == "router" else t[mask] for name, t in given.items()}
    settings = {"statistics": statistics, "upstream": ("mass",), "backend": "triton"}
    found = run(broken, 2, token_mask=mask.to(mask_dtype), **settings)
    expected = run(kept, 2, **settings)
    assert torch.equal(found["counts"], expected["counts"])
    torch.testing.assert_close(found["mass"], expected["mass"])
    torch.testing.assert_close(found["d_x"][mask], expected["d_x"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_token_stays_its_own_problem(bad):
    """A broken token gets NaN weights and valid, distinct experts; no other token moves a bit."""
    logits = torch.randn(20, 5, device=DEVICE)
    broken = logits.clone()
    broken[2] = bad
    broken[3, 1] = bad
    broken[4, 2] = float("nan")
    found = topk_softmax_routing(broken, 4, backend="triton")
    clean = topk_softmax_routing(logits, 4, backend="triton")
    others = [0, 1, *range(5, 20)]
    assert torch.equal(found.weights[others], clean.weights[others])
    assert torch.equal(found.experts[others], clean.experts[others])
    assert found.weights[[2, 4]].isnan().all()
    assert found.weights[3].isnan().all() == (bad != -float("inf"))  # -inf rules one expert out, and 4 are left
    for row in found.experts.tolist():
        assert len(set(row)) == 4
        assert set(row) <= set(range(5))


@pytest.mark.parametrize("statistics", [None, "topk", "full"])
def test_no_tokens(statistics):
    """An empty batch has empty outputs, zero statistics and gradients of the right shapes."""
    given = arguments(0, 40, 5)
    found = run(given, 2, statistics=statistics, backend="triton")
    assert found["weights"].shape == found["experts"].shape == (0, 2)
    assert found["logits"].shape == found["d_offset"].shape == (0, 5)
    assert found["d_x"].shape == (0, 40)
    assert torch.equal(found["d_router"], torch.zeros_like(given["router"]))
    if statistics is not None:
        assert torch.equal(found["counts"], torch.zeros(5, device=DEVICE))
        assert torch.equal(found["mass"], torch.zeros(5, device=DEVICE))


def test_non_contiguous_inputs():
    """Slices are read by their rows, and transposed tensors are read right."""
    given = arguments(33, 40, 6)
    expected = run(given, 2, statistics="full", backend="triton")
    wide = {name: torch.randn(t.shape[0], 2 * t.shape[1], device=DEVICE) for name, t in given.items()}
    for name, t in given.items():
        wide[name][:, : t.shape[1]] = t
    sliced = {name: wide[name][:, : t.shape[1]] for name, t in given.items()}
    transposed = {name: t.T.contiguous().T for name, t in given.items()}
    for changed in (sliced, transposed):
        found = run(changed, 2, statistics="full", backend="triton")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_repetition_is_bit_equal():
    """No result depends on the order in which programs run: the statistics are summed in a fixed one."""
    given = arguments(130, 64, 8, torch.bfloat16)
    first = run(given, 2, statistics="topk", backend="triton")
    with grid_order("reverse"):
        again = run(given, 2, statistics="topk", backend="triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


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
    found = run(given, 2, ("weights",), backend="triton")
    for name in given:
        leaves = {key: t.clone().requires_grad_(key == name) for key, t in given.items()}
        weights = route_tokens(leaves["x"], leaves["router"], 2, offset=leaves["offset"], backend="triton").weights
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
def test_compiles_into_one_graph(dynamic, monkeypatch):
    """Forward and backward without a graph break; with dynamic sizes one graph serves every token count."""
    torch._dynamo.reset()
    # The compiler cannot trace the question whether Triton interprets; that check has tests of its own.
    monkeypatch.setattr("graphmoe_kernels.routing.resolve_backend", lambda *_: "triton")
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, router, offset, mask):
        found = route_tokens(x, router, 2, offset=offset, statistics="topk", token_mask=mask, backend="triton")
        return (found.weights * found.weights).sum() + found.mass[0] + (found.logits * 0.1).sum(), found.tickets

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
    assert found.logits.dtype == found.weights.dtype == torch.float32
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
        ({"token_mask": torch.ones(3, device="meta")}, ValueError, "token_mask is on meta, x on"),
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


def sort_keys(experts):
    """The two smallest experts of each token as one number."""
    ascending = experts.long().sort(-1).values
    return ascending[:, 0] * 256 + (ascending[:, 1] if experts.shape[1] > 1 else 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens, experts, top_k", [(1, 4, 2), (130, 3, 1), (200, 8, 2), (200, 5, 5), (128, 256, 3)])
def test_expert_order_is_the_stable_sort_of_each_window(tokens, experts, top_k, dtype, monkeypatch):
    """Tiles of consecutive tokens share experts; several windows, one that is not full, and many equal keys."""
    monkeypatch.setattr(order, "ORDER_WINDOW", 128)
    chosen = torch.rand(tokens, experts, device=DEVICE).topk(top_k).indices.to(dtype)
    windows = sort_keys(chosen).split(128)
    expected = [torch.argsort(keys, stable=True) + 128 * i for i, keys in enumerate(windows)]
    found = expert_order(chosen)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), torch.cat(expected))


def test_expert_order_of_no_tokens():
    """An empty batch has an empty order."""
    assert expert_order(torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)).shape == (0,)


@pytest.mark.parametrize(
    "experts, error, message",
    [
        (torch.zeros(3, 2), TypeError, "experts must be int64, int32, int16 or uint8, got torch.float32"),
        (torch.zeros(3, dtype=torch.int32), ValueError, r"experts must be \[tokens, top_k\], got shape \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.int32, device="meta"), ValueError, "experts is on meta, and backend='triton'"),
    ],
)
def test_expert_order_refusals(experts, error, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    with pytest.raises(error, match=message):
        expert_order(experts)
