"""The folds themselves: what they contain, when they pay, and the cache that keeps them between forwards."""

import copy
import pickle

import pytest
import torch

from graphmoe_kernels import Fold, FoldCache, RethinkingSpec, build_fold, fold_break_even, rethink, rethink_reference
from graphmoe_kernels.rethinking import FoldSettings, cache
from graphmoe_kernels.testing import cast_layer, relative_error, trainable
from tests.kernels.cases import ODD, Sizes, layer

SPEC = RethinkingSpec(rounds=3, top_k=2, scale=1.5)


def settings(spec: RethinkingSpec = SPEC, dtype: torch.dtype = torch.float64) -> FoldSettings:
    """What a fold depends on besides the weights."""
    return FoldSettings(dtype, spec.scale, spec.candidate_input)


@pytest.mark.oracle
@pytest.mark.parametrize("candidate_input", ["expert_output", "hidden_state"])
@pytest.mark.parametrize("width, padded", [(6, 16), (16, 16), (17, 32)])
def test_contents(width, padded, candidate_input):
    """M, Q and the small products, each against its definition; padding is zero and nothing else."""
    weights = layer(SPEC, ODD._replace(width=width), bias=True)
    fold = build_fold(weights, settings(SPEC._replace(candidate_input=candidate_input)))
    base, e, gru = weights.base, weights.experts, weights.gru
    for product, left in (
        (fold.gate, base.gate),
        (fold.up, base.up),
        (fold.low_gate, e.gate_A.flatten(0, 1)),
        (fold.low_up, e.up_A.flatten(0, 1)),
        (fold.router, weights.router),
    ):
        assert product.shape == (left.shape[0], padded)
        torch.testing.assert_close(product[:, :width], left @ gru.output, rtol=1e-12, atol=1e-13)
        assert not product[:, width:].any()
    reads = [gru.update[:, width:], gru.reset[:, width:]]
    if candidate_input == "expert_output":
        reads.append(gru.candidate[:, width:])
        assert fold.candidate_x is None
        assert fold.candidate_state is None
    else:
        torch.testing.assert_close(fold.candidate_x[:width], gru.candidate[:, width:])
        torch.testing.assert_close(fold.candidate_state[:width, :width], gru.candidate[:, width:] @ gru.output)
    down_B = torch.cat([1.5 * B for B in e.down_B], dim=1)  # [D, n*r]
    for i, columns in enumerate(reads):
        rows = slice(i * padded, i * padded + width)
        torch.testing.assert_close(fold.inputs[rows], columns @ base.down, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(fold.inputs_low[rows], columns @ down_B, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(fold.inputs_bias[rows], columns @ base.down_bias, rtol=1e-12, atol=1e-13)
    assert fold.inputs.shape == (len(reads) * padded, ODD.intermediate)


def test_dtypes():
    """The fold has the compute dtype, also from fp32 adapters on a bf16 base; the router's part stays fp32."""
    weights = cast_layer(layer(SPEC), torch.float32)
    fold = build_fold(weights, settings(dtype=torch.bfloat16))
    assert fold.router.dtype == torch.float32
    assert fold.gate.dtype == fold.inputs.dtype == fold.recurrent_gates.dtype == torch.bfloat16


def test_owns_its_tensors():
    """A kept fold is refreshed in place: were one of its tensors a weight, refreshing would write into the weight.

    At a width without padding and in the weights' own dtype nothing needs to be computed for W_g or the biases."""
    weights = layer(SPEC, ODD._replace(width=16))
    fold = build_fold(weights, settings())
    owned = {t.untyped_storage().data_ptr() for t in [*trainable(weights).values(), *weights.base[:3]]}
    for name, tensor in fold._asdict().items():
        assert tensor is None or tensor.untyped_storage().data_ptr() not in owned, name


def test_needs_a_gru():
    """A layer of one round has nothing to fold, and is told so."""
    with pytest.raises(ValueError, match="nothing to fold in a layer without GRU"):
        build_fold(layer(SPEC._replace(rounds=1)), settings())


def test_break_even_is_where_the_costs_meet():
    """At the break-even building the folds costs what the folded rounds save, counted term by term."""
    D, F, G, T = 64, 160, 16, 3
    build = 2 * F * D * G + 3 * G * D * F
    literal_round = 3 * D * F + 3 * G * D + G * D
    folded_round = 2 * F * G + 3 * G * F
    tokens = fold_break_even(D, F, G, T)
    assert tokens == pytest.approx(build / ((T - 1) * (literal_round - folded_round)))
    assert fold_break_even(D, F, G, 1) == float("inf")
    assert fold_break_even(8, 100, 64, 3) == float("inf"), "a GRU so wide that a folded round costs more"
    assert fold_break_even(D, F, G, 5) < tokens


class Counted:
    """A layer whose builds of the fold are counted."""

    def __init__(self, monkeypatch, sizes: Sizes = ODD) -> None:
        self.weights = layer(SPEC, sizes)
        self.cache = FoldCache(lambda: self.weights)
        self.builds = 0
        monkeypatch.setattr(cache, "build_fold", self._build)

    def _build(self, *arguments) -> Fold:
        self.builds += 1
        return build_fold(*arguments)

    def check(self, builds: int, spec: RethinkingSpec = SPEC) -> None:
        """Two forwards give Algorithm 1's result on the weights as they are; so many folds were built in all."""
        x = torch.randn(4, self.weights.router.shape[1], dtype=torch.float64)
        for _ in range(2):
            y = rethink(x, self.weights, spec, cache=self.cache).y
            assert relative_error(y, rethink_reference(x, self.weights, spec)) <= 1e-12
        assert self.builds == builds


@pytest.mark.parametrize("width", [6, 16])
def test_cache_builds_once_and_again_after_a_change(width, monkeypatch):
    """One build over many forwards, one more for every change of a weight or setting, none for what folds ignore."""
    layer = Counted(monkeypatch, ODD._replace(width=width))
    layer.check(1)
    layer.weights.gru.output.mul_(1.5)
    layer.check(2)
    layer.weights.base.up.add_(0.1)
    layer.check(3)
    layer.weights.experts.gate_B.mul_(2.0)  # read by every round itself, by no fold
    layer.check(3)
    layer.check(4, SPEC._replace(scale=0.5))
    layer.check(5, SPEC._replace(scale=0.5, candidate_input="hidden_state"))
    layer.check(5, SPEC._replace(scale=0.5, candidate_input="hidden_state", rounds=5, normalize=False))
    layer.weights = layer.weights._replace(router=layer.weights.router.clone())
    layer.check(6, SPEC._replace(scale=0.5, candidate_input="hidden_state"))
    layer.cache.drop()
    layer.check(7, SPEC._replace(scale=0.5, candidate_input="hidden_state"))


def test_every_source_is_watched(monkeypatch):
    """Whichever tensor the fold reads: writing into it rebuilds. A source left out is a wrong answer."""
    counted = Counted(monkeypatch)
    counted.check(1)
    weights, read = counted.weights, 0
    before = build_fold(weights, settings()).tensors()
    for part in [*weights.base[:3], *trainable(weights).values()]:
        part.mul_(1.25)
        after = build_fold(weights, settings()).tensors()
        changes = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        counted.check(counted.builds + changes)
        read, before = read + changes, after
    assert read == 3 + 1 + 3 + 5, "base, router, two A and down_B, the GRU"


def test_storage_given_twice_between_forwards(monkeypatch):
    """The old storage is held: its address cannot come back as a new tensor's, with the old version counter."""
    counted = Counted(monkeypatch)
    counted.check(1)
    for builds in range(2, 22):
        for _ in range(2):
            counted.weights.gru.output.data = 1.1 * counted.weights.gru.output
        counted.check(builds)


def test_cache_is_not_used_where_gradients_reach_the_fold(monkeypatch):
    """Training needs the fold inside the graph: a kept one would give no gradient to W_g."""
    counted = Counted(monkeypatch)
    counted.weights.gru.output.requires_grad_()
    x = torch.randn(40, ODD.hidden, dtype=torch.float64)
    rethink(x, counted.weights, SPEC, fold="always", cache=counted.cache).y.sum().backward()
    assert counted.builds == 0
    assert counted.weights.gru.output.grad.abs().sum() > 0


def test_kept_fold_passes_gradients_to_x(monkeypatch):
    """Frozen weights, trainable input (saliency, prompt tuning): the kept fold is differentiated through."""
    counted = Counted(monkeypatch)
    x = torch.randn(4, ODD.hidden, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        rethink(x.detach(), counted.weights, SPEC, cache=counted.cache)
    (found,) = torch.autograd.grad(rethink(x, counted.weights, SPEC, cache=counted.cache).y.sum(), x)
    (exact,) = torch.autograd.grad(rethink_reference(x, counted.weights, SPEC).sum(), x)
    assert counted.builds == 1
    assert relative_error(found, exact) <= 1e-12


def test_copies_start_empty(monkeypatch):
    """A copied cache must not vouch for a fold of the original's weights."""
    counted = Counted(monkeypatch)
    counted.check(1)
    kept = FoldCache(_no_weights)
    kept.refresh([], counted.weights, settings())
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert kept.fold is not None
        assert twin.fold is None
        assert int(twin.handle) != int(kept.handle)


def _no_weights():
    raise AssertionError("nobody asked for them")
