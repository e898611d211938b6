"""`topk_softmax_routing`: weights, statistics, gradients, the degenerate sizes and every refusal."""

import pytest
import torch

from graphmoe_kernels import topk_softmax_routing
from graphmoe_kernels.testing import SLACK


def logits_with_margin(tokens: int, experts: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[N, n] logits, no two in a row nearer than 0.2: half precision and gradcheck flip nothing."""
    rows = [torch.randperm(experts) for _ in range(tokens)]
    base = torch.stack(rows) if rows else torch.zeros(0, experts)
    return (0.4 * base + 0.1 * torch.rand(tokens, experts)).to(dtype)


def by_definition(logits, top_k, normalize):
    """Eq. 4 token by token, in Python: the k most probable experts and their weights."""
    weights, experts = [], []
    for row in logits.double():
        p = torch.exp(row - row.max())
        p = p / p.sum()
        order = sorted(range(len(row)), key=lambda i: -p[i])[:top_k]
        chosen = p[order]
        weights.append(chosen / chosen.sum() if normalize else chosen)
        experts.append(torch.tensor(order))
    return torch.stack(weights), torch.stack(experts)


BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


@pytest.mark.oracle
@BACKENDS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "experts, top_k", [(1, 1), (2, 1), (2, 2), (7, 3), (8, 8), (8, 1)], ids=lambda value: str(value)
)
def test_equals_the_definition(experts, top_k, normalize, backend):
    """Softmax, top-k, renormalisation, for k = 1, k = n, n = 1 and a prime n."""
    logits = logits_with_margin(11, experts)
    weights, chosen = by_definition(logits, top_k, normalize)
    found = topk_softmax_routing(logits, top_k, normalize=normalize, backend=backend)
    assert torch.equal(found.expert_ids, chosen)
    torch.testing.assert_close(found.routing_weights, weights, rtol=1e-13, atol=0)
    assert found.tokens_per_expert is None
    assert found.probability_sums is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax_runs_in_fp32(dtype):
    """Half-precision logits are widened first: the weights' error is fp32's, not theirs."""
    logits = logits_with_margin(50, 8).to(dtype)
    weights, chosen = by_definition(logits, 2, True)
    found = topk_softmax_routing(logits, 2)
    assert found.routing_weights.dtype == torch.float32
    assert torch.equal(found.expert_ids, chosen)
    assert (found.routing_weights.double() - weights).abs().max() <= SLACK[torch.float32]


def test_autocast_does_not_lower_the_routing():
    """The router runs in fp32 whatever autocast says."""
    logits = logits_with_margin(9, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = topk_softmax_routing(logits, 2, statistics="full")
    assert found.routing_weights.dtype == torch.float32
    assert torch.equal(found.routing_weights, topk_softmax_routing(logits, 2).routing_weights)
    assert found.probability_sums.dtype == torch.float32


@pytest.mark.oracle
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("statistics", ["topk", "full"])
def test_statistics_count_what_they_say(statistics, normalize, masked):
    """Eq. 8: counts and probability mass of the counted tokens; the mass is never renormalised."""
    logits = logits_with_margin(13, 5)
    mask = torch.rand(13) < 0.6 if masked else None
    found = topk_softmax_routing(logits, 2, normalize=normalize, statistics=statistics, token_mask=mask)
    counted = torch.ones(13, dtype=torch.bool) if mask is None else mask
    probabilities = logits.softmax(-1)
    entries = torch.zeros(13, 5, dtype=torch.float64).scatter(1, found.expert_ids, 1.0)
    mass = (probabilities * entries if statistics == "topk" else probabilities)[counted].sum(0)
    torch.testing.assert_close(found.tokens_per_expert.double(), entries[counted].sum(0), rtol=0, atol=0)
    torch.testing.assert_close(found.probability_sums, mass, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_mask_may_be_bool_or_zero_and_one(dtype):
    """Tokenisers give the padding mask as integers."""
    logits, mask = logits_with_margin(6, 4), torch.tensor([1, 0, 1, 1, 0, 0])
    reference = topk_softmax_routing(logits, 2, statistics="topk", token_mask=mask.bool())
    found = topk_softmax_routing(logits, 2, statistics="topk", token_mask=mask.to(dtype))
    assert torch.equal(found.tokens_per_expert, reference.tokens_per_expert)
    assert torch.equal(found.probability_sums, reference.probability_sums)


@pytest.mark.oracle
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("statistics", ["topk", "full"])
@pytest.mark.parametrize("experts, top_k", [(5, 2), (4, 4), (3, 1)])
def test_gradcheck(experts, top_k, statistics, normalize):
    """Weights and mass are differentiable in the logits (away from ties)."""
    logits = logits_with_margin(4, experts).requires_grad_()
    mask = torch.tensor([True, False, True, True])

    def run(logits):
        found = topk_softmax_routing(logits, top_k, normalize=normalize, statistics=statistics, token_mask=mask)
        return found.routing_weights, found.probability_sums

    assert torch.autograd.gradcheck(run, logits)


@pytest.mark.parametrize("statistics", [None, "topk", "full"])
def test_no_tokens(statistics):
    """An empty batch routes to empty tensors and zero statistics, and backward runs."""
    logits = torch.zeros(0, 4, requires_grad=True)
    found = topk_softmax_routing(logits, 2, statistics=statistics)
    assert found.routing_weights.shape == found.expert_ids.shape == (0, 2)
    if statistics is not None:
        assert torch.equal(found.tokens_per_expert, torch.zeros(4))
        assert torch.equal(found.probability_sums, torch.zeros(4))
    found.routing_weights.sum().backward()
    assert logits.grad.shape == (0, 4)


@BACKENDS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("columns", [slice(None), 0, 3], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_token_stays_its_own_problem(bad, columns, normalize, backend):
    """A broken token gets non-finite weights and valid, distinct experts; no other token moves a bit."""
    logits = logits_with_margin(5, 4, torch.float32)
    broken = logits.clone()
    broken[2, columns] = bad
    found, clean = (topk_softmax_routing(x, 2, normalize=normalize, backend=backend) for x in (broken, logits))
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found.routing_weights[others], clean.routing_weights[others])
    assert torch.equal(found.expert_ids[others], clean.expert_ids[others])
    if bad == -float("inf") and columns != slice(None):  # an expert that is ruled out, and no broken token
        expected = topk_softmax_routing(broken.double(), 2, normalize=normalize, backend="reference")
        torch.testing.assert_close(found.routing_weights, expected.routing_weights.float())
    else:
        assert not found.routing_weights[2].isfinite().any()
    assert len(set(found.expert_ids[2].tolist())) == 2
    assert ((found.expert_ids >= 0) & (found.expert_ids < 4)).all()


def test_ties_choose_distinct_experts():
    """Equal logits (a router of zeros) still give k distinct experts and equal weights."""
    found = topk_softmax_routing(torch.zeros(6, 5), 3)
    assert all(len(set(row)) == 3 for row in found.expert_ids.tolist())
    torch.testing.assert_close(found.routing_weights, torch.full((6, 3), 1 / 3))


def test_non_contiguous_logits():
    """A transposed view is routed by its rows."""
    logits = logits_with_margin(6, 4)
    assert torch.equal(
        topk_softmax_routing(logits.T.contiguous().T, 2).routing_weights,
        topk_softmax_routing(logits, 2).routing_weights,
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"logits": torch.zeros(3, 4, dtype=torch.long)},
            TypeError,
            "logits must be floating point, got torch.int64",
        ),
        (
            {"logits": torch.zeros(2, 3, 4)},
            ValueError,
            r"logits must be \[tokens, experts\].*\[2, 3, 4\]; flatten",
        ),
        ({"logits": torch.zeros(4)}, ValueError, r"logits must be \[tokens, experts\]"),
        ({"top_k": 0}, ValueError, r"top_k must lie in 1\.\.4 .*got 0"),
        ({"top_k": 5}, ValueError, r"top_k must lie in 1\.\.4 .*got 5"),
        ({"statistics": "all"}, ValueError, "unknown statistics 'all'; expected one of None, 'topk', 'full'"),
        ({"token_mask": torch.ones(2)}, ValueError, r"token_mask must be \[3\], got \[2\]"),
        (
            {"token_mask": torch.ones(3)},
            TypeError,
            "token_mask must be bool or integers, zero for padding, got torch.float32",
        ),
        ({"top_k": True}, TypeError, "top_k must be an integer, got True"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "there are no experts"),
        ({"logits": [[0.0, 1.0]]}, TypeError, "logits must be a tensor, got list"),
        (
            {"logits": torch.zeros(3, 4).to_sparse()},
            TypeError,
            "logits must be a dense tensor, got layout torch.sparse",
        ),
        ({"normalize": "no"}, TypeError, "normalize must be True or False, got 'no'"),
        ({"statistics": ["topk"]}, ValueError, r"unknown statistics \['topk'\]"),
        ({"token_mask": [1, 1, 0]}, TypeError, "token_mask must be a tensor, got list"),
        (
            {"token_mask": torch.ones(3, dtype=torch.complex64)},
            TypeError,
            "token_mask must be bool or integers, zero for padding, got torch.complex64",
        ),
        ({"backend": ["torch"]}, ValueError, r"unknown backend \['torch'\]"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, got 2.0"),
        (
            {"token_mask": torch.ones(3, 1)},
            ValueError,
            r"token_mask must be \[3\], got \[3, 1\]",
        ),
        ({"token_mask": torch.ones(3, device="meta").bool()}, ValueError, "token_mask is on meta, logits on cpu"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; expected one of 'auto', 'triton', 'torch'"),
    ],
)
def test_refusals_name_argument_and_expectation(change, error, message):
    """Every wrong argument is answered by what was wrong and what was expected."""
    arguments = {"logits": torch.zeros(3, 4), "top_k": 2, "statistics": "topk"} | change
    with pytest.raises(error, match=message):
        topk_softmax_routing(**arguments)


@pytest.mark.parametrize("statistics", ["topk", "full"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_an_integer_mask_says_whether_a_token_counts_not_how_often(dtype, statistics):
    """Sequence numbers or lengths as a mask (as packing has them) counted a token 7 times."""
    logits = logits_with_margin(5, 4)
    mask = torch.tensor([7, 0, 1, 100, 0], dtype=dtype)
    found = topk_softmax_routing(logits, 2, statistics=statistics, token_mask=mask)
    expected = topk_softmax_routing(logits, 2, statistics=statistics, token_mask=mask.bool())
    assert torch.equal(found.tokens_per_expert, expected.tokens_per_expert)
    assert found.tokens_per_expert.sum() == 3 * 2
    assert torch.equal(found.probability_sums, expected.probability_sums)
