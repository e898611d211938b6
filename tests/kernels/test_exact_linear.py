"""Routing stays fp32 where fp32 matrix products do not: torch.set_float32_matmul_precision("high") and "medium"."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from graphmoe_kernels import FoldSettings, RethinkingSpec, build_fold, rethink, route_tokens
from graphmoe_kernels.exact_linear import exact_linear
from graphmoe_kernels.testing import make_layer, relative_error
from tests.kernels.lowered_products import BITS, Lowered, precision


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(64, 512).to(dtype), torch.randn(8, 512) / 512**0.5


@pytest.mark.parametrize("setting", BITS)
def test_the_simulation_lowers_products(setting: str) -> None:
    x, router = operands()
    with precision(setting):
        assert relative_error(x @ router.T, x.double() @ router.T.double()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("setting", BITS)
def test_product_and_gradients_are_those_of_fp32(setting: str, dtype: torch.dtype) -> None:
    """Against fp64, within twice the error of the plain fp32 product; forward and both gradients."""
    x, weight = operands(dtype)
    upstream = torch.randn(64, 8)
    results = {}
    for name, kind in (("exact", torch.float64), ("plain", torch.float32), ("lowered", None)):
        leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in (x, weight)]
        if kind is not None:
            y = leaves[0] @ leaves[1].T
            results[name] = [y, *torch.autograd.grad(y, leaves, upstream.to(kind))]
            continue
        with precision(setting) as mode:
            y = exact_linear(*leaves)
            results[name] = [y, *torch.autograd.grad(y, leaves, upstream)]
        assert mode.seen >= 6
    for exact, plain, lowered in zip(*(results[name] for name in ("exact", "plain", "lowered")), strict=True):
        rounding = torch.finfo(lowered.dtype).eps if lowered.dtype != torch.float32 else 1e-8
        assert relative_error(lowered, exact) <= 2 * relative_error(plain, exact) + rounding


def test_nothing_changes_where_products_are_fp32() -> None:
    """The split costs three products for one; who did not ask for less precision does not pay."""
    x, weight = operands()
    with Lowered(0) as mode:
        y = exact_linear(x, weight)
    assert mode.seen == 1
    assert torch.equal(y, x @ weight.T)


def near_ties() -> tuple[Tensor, Tensor]:
    """Tokens whose two best experts' logits, of order 1, differ by 1e-5: fp32 tells them apart, TF32 cannot."""
    x, router = torch.randn(256, 512), torch.randn(8, 512) / 512**0.5
    router[1] = router[0] * (1 + 2e-6)
    router[:2] *= 3
    return x, router


@pytest.mark.parametrize("setting", BITS)
def test_choices_near_a_tie_stay(setting: str) -> None:
    x, router = near_ties()
    expected = route_tokens(x, router, 1)
    exact = x.double() @ router.double().T
    with precision(setting) as mode:
        found = route_tokens(x, router, 1)
        naive = (x @ router.T).argmax(dim=1, keepdim=True)
    assert mode.seen
    gap = exact.topk(2).values.diff().abs()[:, 0]
    clear = gap > 4 * (expected.logits.double() - exact).abs().amax(dim=1)
    assert clear.any()
    assert torch.equal(found.expert_ids[clear], expected.expert_ids[clear])
    assert not torch.equal(naive[clear], expected.expert_ids[clear])


@pytest.mark.parametrize("setting", BITS)
def test_folded_routers_are_fp32(setting: str) -> None:
    """R W_g, which later rounds route by, as it is kept and as it is built in training, with its gradient."""
    weights = make_layer(hidden=64, intermediate=48, num_experts=4, rank=4, gru_width=16, dtype=torch.float32)
    settings = FoldSettings(torch.float32, 1.0, "expert_output")
    plain = build_fold(weights, settings).later
    with precision(setting):
        lowered = build_fold(weights, settings).later
    exact = weights.experts.router.double() @ weights.gru.output.double()
    assert relative_error(lowered.routers[0], exact) <= 2 * relative_error(plain.routers[0], exact) + 1e-8
    assert relative_error(lowered.update.gate, plain.update.gate) > 1e-5, "the other products obey the setting"


@pytest.mark.parametrize("setting", BITS)
@pytest.mark.parametrize("routers", ["layer", "linear"])
def test_a_layers_first_logits_are_fp32(setting: str, routers: str) -> None:
    """Every router that reads x, in training and with kept folds."""
    weights = make_layer(64, 48, num_experts=4, rank=4, gru_width=16, dtype=torch.float32, routers=routers)
    x, spec = torch.randn(32, 64), RethinkingSpec(rounds=2, top_k=2, scale=1.0)
    for fold in ("never", "always"):
        plain = rethink(x, weights, spec, fold=fold).router_logits
        with precision(setting):
            lowered = rethink(x, weights, spec, fold=fold).router_logits
        reading_x = 2 if routers == "linear" else 1
        for own, other in zip(plain[:reading_x], lowered[:reading_x], strict=True):
            assert relative_error(other[0], own[0]) < 1e-6


def test_no_setting_of_pytorchs_is_changed() -> None:
    x, router = operands()
    with precision("high"):
        route_tokens(x, router, 2)
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_it_compiles_and_follows_the_setting() -> None:
    """One graph for each setting: a compiled layer is not left with the products of another."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, (x, weight) = torch.compile(exact_linear, fullgraph=True, backend=counter), operands()
    seen = []
    for setting in ("highest", "high", "highest", "high"):
        torch.set_float32_matmul_precision(setting)
        try:
            assert relative_error(compiled(x, weight), x.double() @ weight.double().T) < 1e-6
        finally:
            torch.set_float32_matmul_precision("highest")
        seen.append(counter.frame_count)
    assert seen == [1, 2, 2, 2]
    torch._dynamo.reset()
