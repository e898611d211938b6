"""A stale fold is a wrong answer: every way in which a weight can change, and the kept fold must follow.

The layer runs in evaluation without gradients, so that a fold is kept; then something changes; then it must give what
the literal loop (``fold="never"``, which keeps nothing) gives on the weights as they are now.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from graphmoe_kernels import FoldCache, build_fold
from graphmoe_kernels.testing import relative_error
from graphmoe_model.layers import ffn
from tests.model.fold_changes import (
    CHANGES,
    COPIES,
    ONE_ROUND_CHANGES,
    OUTPUT,
    WIDTHS,
    D,
    adapter,
    assert_fresh,
    hidden_states,
    in_place,
    literal,
    make,
    random_state,
    run,
)


@pytest.fixture
def builds(monkeypatch) -> list:
    """One entry for every fold that a cache has built."""
    made: list = []

    def counted(*arguments, **options):
        made.append(1)
        return build_fold(*arguments, **options)

    monkeypatch.setattr(ffn, "FoldCache", partial(FoldCache, build=counted))
    return made


@pytest.mark.parametrize("scale", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fold_follows_every_change(change, scale, builds):
    """A fold is kept, a weight or setting changes, and the next forward is that of the layer as it is."""
    layer = make(gru_hidden_scale=scale)
    before = run(layer)
    assert len(builds) == 1, "there is a kept fold to go stale"
    change(layer)
    assert_fresh(layer)
    assert relative_error(run(layer), before) > 1e-6, "the change matters"
    count = len(builds)
    run(layer)
    assert len(builds) == count, "the new fold is kept in its turn"


@pytest.mark.parametrize("change", ONE_ROUND_CHANGES.values(), ids=ONE_ROUND_CHANGES)
def test_kept_experts_of_one_round_follow_every_change(change, builds):
    """Plain MixLoRA keeps no products but copies of its experts, which go stale in the same ways."""
    layer = make(rounds=1)
    before = run(layer)
    assert len(builds) == 1, "there are kept experts to go stale"
    change(layer)
    assert_fresh(layer)
    assert relative_error(run(layer), before) > 1e-6, "the change matters"


@pytest.mark.parametrize("half", ["gate", "up"])
def test_fused_projection_changes(half):
    """Gate and up of a fused projection are views of one tensor: a write into either half is seen."""
    layer = make(fused=True)
    before = run(layer)
    with torch.no_grad():
        layer.base_layer.gate_up_proj.weight.chunk(2)[half == "up"].mul_(1.5)
    assert_fresh(layer)
    assert relative_error(run(layer), before) > 1e-6


@pytest.mark.parametrize("part", [OUTPUT, "base_layer.up_proj.weight"])
def test_storage_never_comes_back_as_another(part):
    """Storage given away and taken again by the allocator must not pass for the old values (seen 9 times in 20)."""
    layer = make()
    for _ in range(20):
        run(layer)
        parameter = layer.get_parameter(part)
        for _ in range(2):
            parameter.data = 1.05 * parameter.data
        assert_fresh(layer)


def test_data_write_alone_is_not_seen():
    """Documented: a write through ``.data`` leaves no trace, and `refold` is for whoever writes so."""
    layer = make()
    before = run(layer)
    in_place(layer, OUTPUT, lambda w: w.data.mul_(2))
    assert torch.equal(run(layer), before)
    layer.refold()
    assert_fresh(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_of_the_layer(dtype):
    """`.to(dtype)`: the fold is rebuilt in it; the bound is that of near ties, none of which this x has."""
    layer = make()
    before = run(layer)
    layer.to(dtype)
    y = run(layer)
    assert y.dtype == dtype
    assert relative_error(y, before) < 20 * torch.finfo(dtype).eps
    layer.double()
    assert_fresh(layer)
    assert relative_error(run(layer), before) < 20 * torch.finfo(dtype).eps


def test_autocast_and_not_in_turn():
    """The fold's dtype is part of what it is: with autocast and without, in any order."""
    layer = make(torch.float32)
    plain = run(layer)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = run(layer)
        assert relative_error(lowered, literal(layer)) < 0.05
    assert torch.equal(run(layer), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(layer), lowered)


@pytest.mark.parametrize("twice", COPIES.values(), ids=COPIES)
def test_copies_keep_folds_of_their_own(twice):
    """A copied layer (EMA, evaluation workers) must neither use nor touch the original's fold."""
    layer = make()
    before = run(layer)
    twin = twice(layer)
    assert torch.equal(run(twin), before)
    in_place(twin, OUTPUT, lambda w: w.mul_(2))
    assert_fresh(twin)
    assert torch.equal(run(layer), before)
    in_place(layer, OUTPUT, lambda w: w.mul_(-1))
    assert_fresh(layer)
    assert_fresh(twin)


def test_refreshing_writes_into_no_weight():
    """Folds are refreshed in place; weights that were replaced, and live on elsewhere, must stay what they are."""
    layer = make(gru_hidden_scale=0.5)
    run(layer)
    originals = dict(layer.state_dict())  # the tensors themselves
    values = {name: t.clone() for name, t in originals.items()}
    layer.load_state_dict(random_state(layer), assign=True)
    assert_fresh(layer)
    assert all(torch.equal(originals[name], t) for name, t in values.items())


def test_functional_call():
    """torch.func.functional_call lends other weights for one call: neither they nor the own ones may be stale."""
    layer, x = make(), hidden_states()
    before = run(layer)
    lent = {name: 0.5 * p.detach() for name, p in layer.named_parameters()}
    twin = copy.deepcopy(layer)
    twin.load_state_dict(lent)
    with torch.no_grad():
        found = torch.func.functional_call(layer, lent, (x,))
    assert relative_error(found, literal(twin)) <= 1e-11
    assert torch.equal(run(layer), before)


def test_fold_is_built_once_and_never_in_training(builds):
    """The cache is used: one build for many forwards of any length, at any T; none in training and without folds."""
    layer = make()
    with torch.no_grad():
        for count in (1, 7, 64, 1):
            layer(torch.randn(count, D, dtype=torch.float64))
    assert len(builds) == 1
    layer.train()
    for _ in range(2):
        layer(torch.randn(300, D, dtype=torch.float64)).sum().backward()
    assert len(builds) == 1
    run(make(fold="never"))
    assert len(builds) == 1
    run(make(rounds=1))
    assert len(builds) == 2


@pytest.mark.parametrize("use", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("creation", [torch.inference_mode, torch.no_grad])
def test_inference_mode(creation, use):
    """Weights made inside torch.inference_mode have no version counter; the layer runs all the same."""
    with creation():
        layer = make()
    expected = literal(layer)
    with use():
        x = hidden_states()
        assert relative_error(layer(x), expected) <= 1e-11
        assert relative_error(layer(x), expected) <= 1e-11
    assert relative_error(run(layer), expected) <= 1e-11


def test_fold_built_in_inference_mode_serves_gradients_later():
    """Generate first, then ask for the gradient of x: the kept fold must be no inference tensor."""
    layer = make(inference_mode=True)
    x = hidden_states()
    with torch.inference_mode():
        layer(x)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    adapter(layer).config.fold = "never"
    (exact,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    assert relative_error(found, exact) <= 1e-11


def test_write_to_an_inference_tensor_needs_refold():
    """Documented with `.data`: a weight created in inference mode counts no versions either."""
    with torch.inference_mode():
        layer = make()
        before = run(layer)
        adapter(layer).gru.output_proj.weight.mul_(2)
        assert torch.equal(run(layer), before)
        layer.refold()
        assert_fresh(layer)
