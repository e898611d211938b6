"""The recurrence over shapes and options that nobody thought of: folded equals literal, and order means nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphmoe_kernels import ACTIVATIONS, RethinkingSpec, rethink_folded, rethink_literal, rethink_reference
from graphmoe_kernels.testing import relative_error
from tests.kernels.cases import Sizes, assert_equal_to, decided_tokens, gradients, layer


@st.composite
def problems(draw):
    """A spec, a layer, and fp64 inputs whose routing is no near tie in any round."""
    experts = draw(st.integers(1, 9))
    sizes = Sizes(
        hidden=draw(st.integers(1, 24)),
        intermediate=draw(st.integers(1, 40)),
        experts=experts,
        rank=draw(st.integers(1, 6)),
        width=draw(st.integers(1, 20)),
    )
    spec = RethinkingSpec(
        rounds=draw(st.integers(1, 5)),
        top_k=draw(st.integers(1, experts)),
        scale=draw(st.sampled_from([0.25, 1.0, 2.0])),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        normalize=draw(st.booleans()),
        candidate_input=draw(st.sampled_from(["expert_output", "hidden_state"])),
        candidate_activation=draw(st.sampled_from(["sigmoid", "tanh"])),
    )
    seed = draw(st.integers(0, 2**16))
    weights = layer(spec, sizes, bias=draw(st.booleans()), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(draw(st.integers(0, 12)), sizes.hidden, generator=generator, dtype=torch.float64)
    return spec, weights, x[decided_tokens(x, weights, spec, 1e-6)]


@pytest.mark.oracle
@settings(max_examples=60)
@given(problems())
def test_folded_equals_literal(problem):
    """y and every gradient, whatever the sizes and options."""
    spec, weights, x = problem
    upstream = torch.randn_like(x)
    literal = gradients(lambda x, w: rethink_literal(x, w, spec, backend="reference").y, x, weights, upstream)
    for backend in ("torch", "reference"):
        folded = gradients(
            lambda x, w, backend=backend: rethink_folded(x, w, spec, backend=backend).y, x, weights, upstream
        )
        # Products of narrow random weights may nearly cancel: a hundred times the bound of the usual sizes.
        assert_equal_to(folded, literal, upstream, 1e-10)


@settings(max_examples=40)
@given(problems(), st.randoms(use_true_random=False))
def test_tokens_are_independent(problem, random):
    """Permuting tokens permutes outputs, and a token alone gets what it gets in company."""
    spec, weights, x = problem
    order = list(range(x.shape[0]))
    random.shuffle(order)
    for run in (rethink_folded, rethink_literal):
        y = run(x, weights, spec).y
        assert relative_error(run(x[order], weights, spec).y, y[order]) <= 1e-12
        if order:
            assert relative_error(run(x[order[:1]], weights, spec).y, y[order[:1]]) <= 1e-11


@settings(max_examples=40)
@given(problems(), st.randoms(use_true_random=False))
def test_expert_names_mean_nothing(problem, random):
    """Permuting the experts with the router's rows leaves y alone and permutes the logits."""
    spec, weights, x = problem
    experts, lora = weights.experts, weights.experts.lora
    order = list(range(experts.router.shape[0]))
    random.shuffle(order)
    permuted = weights._replace(
        experts=type(experts)(type(lora)(*(t[order] for t in lora.pairs)), experts.router[order])
    )
    for run in (rethink_folded, rethink_literal):
        before, after = run(x, weights, spec), run(x, permuted, spec)
        assert relative_error(after.y, before.y) <= 1e-11
        for mine, own in zip(after.router_logits[0], before.router_logits[0], strict=True):
            torch.testing.assert_close(mine, own[:, order], rtol=1e-10, atol=1e-12)


@settings(max_examples=30)
@given(problems())
def test_all_experts_equal_is_one_expert(problem):
    """n copies of one expert with normalised weights are that expert: routing cannot matter then."""
    spec, weights, x = problem
    spec = spec._replace(normalize=True)
    experts, lora = weights.experts, weights.experts.lora
    copies = experts._replace(lora=type(lora)(*(t[:1].expand_as(t).contiguous() for t in lora.pairs)))
    single = weights._replace(experts=type(experts)(type(lora)(*(t[:1] for t in lora.pairs)), experts.router[:1]))
    alone = rethink_reference(x, single, spec._replace(top_k=1))
    for run in (rethink_folded, rethink_literal):
        assert relative_error(run(x, weights._replace(experts=copies), spec).y, alone) <= 1e-11
