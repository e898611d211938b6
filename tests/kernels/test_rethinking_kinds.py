"""Every kind of experts through the one recurrence: chosen, mixed in each linear, a single one; each with DoRA.

The oracle is `rethink_reference`, which forms every adapted weight; the methods are judged once more against oracles of
their own in tests/model.
"""

import pytest
import torch

from graphmoe_kernels import (
    FoldCache,
    FoldSettings,
    RethinkingSpec,
    SingleExpert,
    build_fold,
    fold_break_even,
    rethink,
    rethink_folded,
    rethink_literal,
    rethink_reference,
)
from graphmoe_kernels.dora import dora_scale, row_norms
from graphmoe_kernels.structures import map_tensors, tensors_in
from graphmoe_kernels.testing import cast_layer, relative_error
from tests.kernels.cases import ODD, Sizes, assert_equal_to, decided_tokens, gradients, layer
from tests.kernels.test_rethinking_precision import assert_within_budget

pytestmark = [pytest.mark.oracle, pytest.mark.methods]

BASE = RethinkingSpec(rounds=3, top_k=2, scale=1.5)
ONE = ODD._replace(experts=1)
# routers, experts a token, sizes
KINDS = {
    "chosen": ("layer", 2, ODD),
    "mixed, top-k": ("linear", 2, ODD),
    "mixed, dense": ("linear", ODD.experts, ODD),
    "mixed, one expert": ("linear", 1, ONE),
    "single": (None, 1, ONE),
}
IMPLEMENTATIONS = {"folded": rethink_folded, "literal": rethink_literal}


def check(kind: str, dora: bool, count: int = 7, bias: bool = False, **options) -> None:
    """Folded and literal, on both PyTorch backends, equal Algorithm 1: y and every gradient."""
    routers, top_k, sizes = KINDS[kind]
    spec = BASE._replace(top_k=top_k, **options)
    weights = layer(spec, sizes, routers=routers, dora=dora, bias=bias)
    x = torch.randn(count, sizes.hidden, dtype=torch.float64)
    upstream = torch.randn_like(x)
    oracle = gradients(lambda x, w: rethink_reference(x, w, spec), x, weights, upstream)
    for run in IMPLEMENTATIONS.values():
        for backend in ("torch", "reference"):
            found = gradients(
                lambda x, w, run=run, backend=backend: run(x, w, spec, backend=backend).y, x, weights, upstream
            )
            assert_equal_to(found, oracle, upstream)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_algorithm_1(kind, rounds, dora, bias):
    """The folds are identities for every kind of experts, whatever part of them DoRA leaves."""
    check(kind, dora, bias=bias, rounds=rounds)


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_equals_algorithm_1(kind, dora):
    """Options that other terms depend on: raw routing weights, what the candidate reads, tanh, another activation."""
    check(
        kind,
        dora,
        bias=True,
        normalize=False,
        candidate_input="hidden_state",
        candidate_activation="tanh",
        activation="gelu_tanh",
    )


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens(kind, dora, count):
    """No token and one token: shapes that a mixture's products must survive."""
    check(kind, dora, count)


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_fold_notices_every_source(kind, dora):
    """A change of any tensor that a fold is made of reaches the next forward; with DoRA that is the base too, in a
    single round as well."""
    routers, top_k, sizes = KINDS[kind]
    for rounds in (1, 3):
        spec = BASE._replace(top_k=top_k, rounds=rounds)
        weights = layer(spec, sizes, routers=routers, dora=dora, bias=True)
        cache = FoldCache(lambda weights=weights: weights)
        x = torch.randn(5, sizes.hidden, dtype=torch.float64)
        rethink(x, weights, spec, cache=cache)
        changing = [*weights.base, *weights.experts.routers(), *weights.experts.lora.tensors()]
        for tensor in [*changing, *(weights.gru or ())]:
            tensor.mul_(1.25)
            found = rethink(x, weights, spec, cache=cache).y
            assert relative_error(found, rethink_reference(x, weights, spec)) < 1e-12


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("kind", ["chosen", "mixed, top-k", "mixed, dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_budget(kind, dora, dtype):
    """Neither the folds nor the mixture's shape may cost accuracy below fp64."""
    routers, top_k, sizes = KINDS[kind]
    spec = BASE._replace(top_k=top_k)
    exact = cast_layer(cast_layer(layer(spec, sizes, routers=routers, dora=dora), dtype), torch.float64)
    x = torch.randn(512, sizes.hidden, dtype=torch.float64).to(dtype).double()
    x = x[decided_tokens(x, exact, spec, 0.1)][:48]
    assert len(x) == 48
    upstream = torch.randn_like(x).to(dtype).double()
    oracle = gradients(lambda x, w: rethink_reference(x, w, spec), x, exact, upstream)
    low, weights = x.to(dtype), cast_layer(exact, dtype)
    literals = [
        gradients(lambda x, w: rethink_literal(x, w, spec, backend="reference").y, low, weights, upstream),
        gradients(lambda x, w: rethink_reference(x, w, spec), low, weights, upstream),
    ]
    for run in IMPLEMENTATIONS.values():
        found = gradients(lambda x, w, run=run: run(x, w, spec).y, low, weights, upstream)
        assert_within_budget(found, literals, oracle, upstream, dtype)


@pytest.mark.parametrize("routers, routed", [("layer", 1), ("linear", 3)])
def test_logits_of_every_router(routers, routed):
    """By router, then by round, alike in both loops: the mixture's down router, which reads c, too."""
    weights = layer(BASE, routers=routers)
    x = torch.randn(9, ODD.hidden, dtype=torch.float64)
    folded, literal = (run(x, weights, BASE).router_logits for run in (rethink_folded, rethink_literal))
    assert [[tuple(own.shape) for own in rounds] for rounds in folded] == [[(9, ODD.experts)] * 3] * routed
    torch.testing.assert_close(folded, literal, rtol=1e-12, atol=1e-12)
    assert rethink_folded(x, layer(BASE, ONE, routers=None), BASE._replace(top_k=1)).router_logits == ()


def test_experts_without_a_router_are_refused():
    """Two experts and no router: there is no saying which."""
    weights = layer(BASE)
    weights = weights._replace(experts=SingleExpert(weights.experts.lora))
    with pytest.raises(ValueError, match="5 experts need a router; without one there can be one expert"):
        rethink(torch.randn(2, ODD.hidden, dtype=torch.float64), weights, BASE)


def test_dora_starts_where_the_base_is():
    """Magnitudes set to the norms give scale vectors of exactly 1, in every dtype, whatever A is."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight = torch.randn(21, 13).to(dtype)
        A, B = torch.randn(4, 3, 13, dtype=dtype), torch.zeros(4, 21, 3, dtype=dtype)
        for magnitude in (row_norms(weight, A, B, 2.0), row_norms(weight, A, B, 2.0).to(dtype)):
            assert torch.equal(dora_scale(magnitude, weight, A, B, 2.0), torch.ones(4, 21).to(magnitude.dtype))


def test_row_norms_are_those_of_the_sum(monkeypatch):
    """Computed without forming W + s B A, in blocks of rows where W has to be cast."""
    monkeypatch.setattr("graphmoe_kernels.dora.BLOCK_ELEMENTS", 40)
    weight, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((21, 13), (4, 3, 13), (4, 21, 3)))
    exact = torch.linalg.vector_norm(weight + 0.5 * B @ A, dim=-1)
    torch.testing.assert_close(row_norms(weight, A, B, 0.5), exact, rtol=1e-13, atol=0)
    half = row_norms(weight.bfloat16(), A.bfloat16(), B.bfloat16(), 0.5)
    assert half.dtype == torch.float32
    rounded = (t.bfloat16().double() for t in (weight, A, B))
    torch.testing.assert_close(half.double(), row_norms(*rounded, 0.5), rtol=1e-6, atol=0)


def test_dora_breaks_even_later_or_earlier_by_its_own_products():
    """With DoRA only M is built and the base gate and up products alone are saved."""
    D, F, G = 4096, 14336, 416
    saved = 2 * D * F + D * G - 2 * G * F
    assert fold_break_even(D, F, G, 3, dora=True) == 2 * D * F * G / (2 * saved)
    assert fold_break_even(D, F, G, 1, dora=True) == float("inf")


def test_dora_keeps_no_product_with_the_down_projection():
    """Q does not hold where vectors stand between the GRU's weights and the down projection: W^y is kept instead."""
    for routers in ("layer", "linear"):
        weights = layer(BASE, Sizes(), routers=routers, dora=True)
        later = build_fold(weights, FoldSettings(torch.float64, 1.5, "expert_output")).later
        assert [tuple(t.shape) for t in tensors_in(later.reader)] == [(48, ODD.hidden)]


@pytest.mark.parametrize("dora", [False, True], ids=["", "DoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_is_mapped_whole(kind, dora):
    """Also the tensors in its plain tuples, as those of the routers: one router came back as its rows, two failed."""
    routers, top_k, sizes = KINDS[kind]
    spec = BASE._replace(top_k=top_k)
    fold = build_fold(
        layer(spec, sizes, routers=routers, dora=dora), FoldSettings(torch.float64, spec.scale, spec.candidate_input)
    )
    copied = map_tensors(torch.clone, fold)
    assert len(copied.later.routers) == len(fold.later.routers)
    for copy, original in zip(copied.tensors(), fold.tensors(), strict=True):
        assert torch.equal(copy, original)
        assert copy.data_ptr() != original.data_ptr()
