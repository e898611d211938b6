"""The Triton backend of routing: the values and gradients of every dtype and size, ties, padding, broken tokens."""

from collections import defaultdict
from itertools import product

import pytest
import torch

from graphmoe_kernels import topk_softmax_routing
from graphmoe_kernels.routing.triton.launch_backward import PRODUCT_EXPERTS
from graphmoe_kernels.testing import SLACK, relative_error, within_budget
from tests.interpreter import grid_order
from tests.kernels.lowered_products import precision
from tests.kernels.routing_operands import DEVICE, arguments, run
from tests.kernels.triton_marks import MARKS

pytestmark = MARKS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, D, n, k: no and several full tiles of tokens and of the width, one expert, all of them, the most of both
SIZES = [
    *[(1, 40, 1, 1), (5, 40, 2, 1), (64, 72, 5, 2), (130, 200, 8, 2), (65, 64, 8, 8), (17, 130, 64, 2)],
    *[(5, 40, 256, 1), (5, 40, 256, 256)],
]


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
        if name in ("expert_ids", "tokens_per_expert"):
            assert torch.equal(value.double(), oracle.double()), name
            continue
        assert value.dtype == reference.dtype
        errors = relative_error(value, oracle), relative_error(reference, oracle)
        assert within_budget(*errors, value.dtype), (name, *errors)


@pytest.mark.parametrize(
    "upstream", [("logits",), ("routing_weights",), ("probability_sums",), ("routing_weights", "probability_sums")]
)
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
    assert relative_error(found.routing_weights, exact.routing_weights) <= SLACK[torch.float32]
    gradient = torch.randn(70, 2, device=DEVICE)
    (value,) = torch.autograd.grad(
        (found.routing_weights * gradient).sum() + found.probability_sums[1] + found.logits[:, 0].sum(),
        logits,
        retain_graph=True,
    )
    (oracle,) = torch.autograd.grad(
        (exact.routing_weights * gradient).sum() + exact.probability_sums[1] + exact.logits[:, 0].sum(), logits
    )
    assert value.dtype == dtype
    assert relative_error(value, oracle) <= 2 * SLACK[dtype]


def test_ties_choose_the_lower_index():
    """A router of zeros, and equal logits among others, choose the same experts on every machine and in every run."""
    found = topk_softmax_routing(torch.zeros(5, 7, device=DEVICE), 3, backend="triton")
    assert torch.equal(found.expert_ids.cpu(), torch.arange(3, dtype=torch.int32).expand(5, 3))
    torch.testing.assert_close(found.routing_weights.cpu(), torch.full((5, 3), 1 / 3))
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 2.0]], device=DEVICE)
    found = topk_softmax_routing(logits, 6, backend="triton")
    assert found.expert_ids.tolist() == [[1, 3, 5, 2, 4, 0]]


@pytest.mark.parametrize("experts", [1, 8, 37])
def test_all_experts_are_the_softmax(experts):
    """k = n leaves nothing out: the weights are the softmax, in falling order, renormalised or not."""
    logits = torch.randn(9, experts, device=DEVICE)
    expected = logits.softmax(-1).sort(-1, descending=True).values
    for normalize in (True, False):
        found = topk_softmax_routing(logits, experts, normalize=normalize, backend="triton")
        torch.testing.assert_close(found.routing_weights, expected, rtol=2e-6, atol=1e-7)
        assert all(sorted(row) == list(range(experts)) for row in found.expert_ids.tolist())


@pytest.mark.parametrize("statistics", ["topk", "full"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8])
def test_padding_stays_out_of_the_statistics(statistics, mask_dtype):
    """Padding may hold NaN: no count, no mass and no gradient of a counted token comes from it."""
    given = arguments(37, 40, 5)
    mask = torch.rand(37, device=DEVICE) < 0.6
    broken = given | {"x": given["x"].masked_fill(~mask[:, None], float("nan"))}
    kept = {name: t if name == "router" else t[mask] for name, t in given.items()}
    settings = {"statistics": statistics, "upstream": ("probability_sums",), "backend": "triton"}
    found = run(broken, 2, token_mask=mask.to(mask_dtype), **settings)
    expected = run(kept, 2, **settings)
    assert torch.equal(found["tokens_per_expert"], expected["tokens_per_expert"])
    torch.testing.assert_close(found["probability_sums"], expected["probability_sums"])
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
    assert torch.equal(found.routing_weights[others], clean.routing_weights[others])
    assert torch.equal(found.expert_ids[others], clean.expert_ids[others])
    assert found.routing_weights[[2, 4]].isnan().all()
    assert found.routing_weights[3].isnan().all() == (bad != -float("inf"))  # -inf rules one expert out, and 4 are left
    for row in found.expert_ids.tolist():
        assert len(set(row)) == 4
        assert set(row) <= set(range(5))


@pytest.mark.parametrize("statistics", [None, "topk", "full"])
def test_no_tokens(statistics):
    """An empty batch has empty outputs, zero statistics and gradients of the right shapes."""
    given = arguments(0, 40, 5)
    found = run(given, 2, statistics=statistics, backend="triton")
    assert found["routing_weights"].shape == found["expert_ids"].shape == (0, 2)
    assert found["logits"].shape == found["d_offset"].shape == (0, 5)
    assert found["d_x"].shape == (0, 40)
    assert torch.equal(found["d_router"], torch.zeros_like(given["router"]))
    if statistics is not None:
        assert torch.equal(found["tokens_per_expert"], torch.zeros(5, device=DEVICE))
        assert torch.equal(found["probability_sums"], torch.zeros(5, device=DEVICE))


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


@pytest.mark.parametrize("dtype, router_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
@pytest.mark.parametrize("tokens, width, experts", [(330, 72, 8), (40, 1040, 1), (170, 40, 64), (3, 130, 65)])
def test_gradients_of_many_tokens_and_columns(tokens, width, experts, dtype, router_dtype):
    """Tokens in several splits, which are added up; columns in several programs; more experts than the kernels take."""
    given = arguments(tokens, width, experts, dtype, router_dtype, offset=False)
    top_k, upstream = min(experts, 8), ("logits", "routing_weights")
    found = run(given, top_k, upstream, backend="triton")
    literal = run(given, top_k, upstream, backend="reference")
    exact = run(given, top_k, upstream, dtype=torch.float64, backend="reference")
    for name in ("d_x", "d_router"):
        errors = relative_error(found[name], exact[name]), relative_error(literal[name], exact[name])
        assert found[name].dtype == literal[name].dtype
        assert within_budget(*errors, found[name].dtype), (name, *errors)


@pytest.mark.parametrize("experts", [5, 70])
def test_gradients_stay_fp32_where_products_do_not(experts):
    """The kernels' products are fp32 by themselves; those with more experts are PyTorch's, which obey a setting."""
    given = arguments(65, 72, experts, torch.float32, torch.float32)
    exact = run(given, 2, dtype=torch.float64, backend="reference")
    plain = run(given, 2, backend="triton")
    with precision("high") as mode:
        lowered = run(given, 2, backend="triton")
    assert bool(mode.seen) == (experts > PRODUCT_EXPERTS)
    for name in ("d_x", "d_router"):
        errors = relative_error(lowered[name], exact[name]), relative_error(plain[name], exact[name])
        assert errors[0] <= 2 * errors[1] + 1e-8, (name, *errors)
