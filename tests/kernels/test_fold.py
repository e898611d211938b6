"""The folds themselves: what they contain, when they pay, and the cache that keeps them between forwards."""

import copy
import pickle

import pytest
import torch

from graphmoe_kernels import (
    Fold,
    FoldCache,
    FoldSettings,
    RethinkingSpec,
    build_fold,
    fold_break_even,
    rethink,
    rethink_literal,
    rethink_reference,
)
from graphmoe_kernels.rethinking import folding
from graphmoe_kernels.rethinking import literal as literal_loop
from graphmoe_kernels.structures import tensors_in
from graphmoe_kernels.testing import cast_layer, relative_error, trainable
from tests.kernels.cases import ODD, Sizes, layer

SPEC = RethinkingSpec(rounds=3, top_k=2, scale=1.5)
ONE_ROUND = SPEC._replace(rounds=1)


def settings(spec: RethinkingSpec = SPEC, dtype: torch.dtype = torch.float64) -> FoldSettings:
    """What a fold depends on besides the weights."""
    return FoldSettings(dtype, spec.scale, spec.candidate_input)


@pytest.mark.oracle
@pytest.mark.parametrize("candidate_input", ["expert_output", "hidden_state"])
@pytest.mark.parametrize("width, padded", [(6, 16), (16, 16), (17, 32)])
def test_contents(width, padded, candidate_input):
    """M, Q and the small products, each against its definition; padding is zero and nothing else."""
    weights = layer(SPEC, ODD._replace(width=width), bias=True)
    fold = build_fold(weights, settings(SPEC._replace(candidate_input=candidate_input))).later
    base, e, gru = weights.base, weights.experts.lora, weights.gru
    for product, left in (
        (fold.update.gate, base.gate),
        (fold.update.up, base.up),
        (fold.routers[0], weights.experts.router),
    ):
        assert product.shape == (left.shape[0], padded)
        torch.testing.assert_close(product[:, :width], left @ gru.output, rtol=1e-12, atol=1e-13)
        assert not product[:, width:].any()
    reads = [gru.update[:, width:], gru.reset[:, width:]]
    if candidate_input == "expert_output":
        reads.append(gru.candidate[:, width:])
        assert fold.hidden_state is None
    else:
        torch.testing.assert_close(fold.hidden_state.x[:width], gru.candidate[:, width:])
        torch.testing.assert_close(fold.hidden_state.total[:width, :width], gru.candidate[:, width:] @ gru.output)
    down_B = torch.cat([1.5 * B for B in e.down_B], dim=1)  # [D, n*r]
    for i, columns in enumerate(reads):
        rows = slice(i * padded, i * padded + width)
        torch.testing.assert_close(fold.reader.inputs[rows], columns @ base.down, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(fold.reader.inputs_low[rows], columns @ down_B, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(fold.reader.inputs_bias[rows], columns @ base.down_bias, rtol=1e-12, atol=1e-13)
    assert fold.reader.inputs.shape == (len(reads) * padded, ODD.intermediate)
    for kept, own in ((fold.candidate_weight, gru.candidate[:, :width]), (fold.output, gru.output)):
        assert kept.shape[1] == padded
        assert torch.equal(kept[: own.shape[0], :width], own)
        assert kept.count_nonzero() == own.count_nonzero()
    assert torch.equal(fold.candidate_bias, torch.cat([gru.candidate_bias, torch.zeros(padded - width)]))


@pytest.mark.oracle
@pytest.mark.parametrize("width, padded", [(6, 16), (16, 16), (17, 32)])
def test_reread(width, padded):
    """What [h | H] is multiplied with: A W_g of gate and up on H alone, W_z and W_r on h alone, and zeros.

    A nonzero in the wrong half would let a round read the state for the sum of states, or the other way about.
    """
    weights = layer(SPEC, ODD._replace(width=width))
    e, gru = weights.experts.lora, weights.gru
    low = ODD.experts * ODD.rank
    expected = torch.zeros(2 * low + 2 * padded, 2 * padded, dtype=torch.float64)
    expected[:low, padded : padded + width] = e.gate_A.flatten(0, 1) @ gru.output
    expected[low : 2 * low, padded : padded + width] = e.up_A.flatten(0, 1) @ gru.output
    expected[2 * low : 2 * low + width, :width] = gru.update[:, :width]
    expected[2 * low + padded : 2 * low + padded + width, :width] = gru.reset[:, :width]
    found = build_fold(weights, settings()).later.reread
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert not found[expected == 0].any()


@pytest.mark.oracle
@pytest.mark.parametrize("spec", [SPEC, ONE_ROUND], ids=["T = 3", "T = 1"])
def test_prepared_experts(spec):
    """The experts as the operators take them: A of gate over A of up, s B_D side by side, the rest as it is."""
    weights = layer(spec)
    fold, e = build_fold(weights, settings()), weights.experts.lora
    assert torch.equal(fold.experts.low_A, torch.cat([*e.gate_A, *e.up_A]))
    assert torch.equal(fold.experts.down.B, torch.cat([1.5 * B for B in e.down_B], dim=1))
    for kept, own in zip((*fold.experts.B, fold.experts.down_A), (e.gate_B, e.up_B, e.down_A), strict=True):
        assert torch.equal(kept, own)


def test_a_layer_of_one_round_folds_its_experts_alone():
    """Without a GRU there are no later rounds; what remains must be all that is kept, counted and refreshed."""
    fold = build_fold(layer(ONE_ROUND), settings(ONE_ROUND))
    assert fold.later is None
    assert [t.data_ptr() for t in fold.tensors()] == [t.data_ptr() for t in tensors_in(fold.experts)]


def test_dtypes():
    """The fold has the compute dtype, also from fp32 adapters on a bf16 base; the router's part stays fp32."""
    weights = cast_layer(layer(SPEC), torch.float32)
    fold = build_fold(weights, settings(dtype=torch.bfloat16))
    assert [t.dtype for t in fold.later.routers] == [torch.float32]
    later = fold.later
    products = [*later.update, *tensors_in(later.reader), later.reread]
    lowered = [*products, later.candidate_weight, *tensors_in(fold.experts)]
    assert {t.dtype for t in lowered} == {torch.bfloat16}


@pytest.mark.parametrize("candidate_input", ["expert_output", "hidden_state"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("width", [6, 16, None], ids=["padded", "not padded", "no GRU"])
def test_a_copy_owns_its_tensors(width, bias, candidate_input):
    """A kept fold is refreshed in place: were one of its tensors a weight, refreshing would write into the weight.

    At a width without padding and in the weights' own dtype nothing needs to be computed for B, W_g or the biases.
    And no two of its tensors are one piece of memory, or the second refresh would undo the first.
    """
    weights = layer(SPEC if width else ONE_ROUND, ODD._replace(width=width), bias=bias)
    fold = build_fold(weights, settings(SPEC._replace(candidate_input=candidate_input)), copy=True)
    sources = [*trainable(weights).values(), *(t for t in weights.base if t is not None)]
    owned = {t.untyped_storage().data_ptr() for t in sources}
    kept = [t.untyped_storage().data_ptr() for t in fold.tensors()]
    assert len(set(kept)) == len(kept)
    assert not owned & set(kept)


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

    def __init__(self, sizes: Sizes = ODD, spec: RethinkingSpec = SPEC) -> None:
        self.weights = layer(spec, sizes)
        self.cache = FoldCache(lambda: self.weights, build=self._build)
        self.builds = 0

    def _build(self, *arguments, **options) -> Fold:
        self.builds += 1
        return build_fold(*arguments, **options)

    def check(self, builds: int, spec: RethinkingSpec = SPEC) -> None:
        """Two forwards give Algorithm 1's result on the weights as they are; so many folds were built in all."""
        x = torch.randn(4, self.weights.experts.lora.gate_A.shape[2], dtype=torch.float64)
        for _ in range(2):
            y = rethink(x, self.weights, spec, cache=self.cache).y
            assert relative_error(y, rethink_reference(x, self.weights, spec)) <= 1e-12
        assert self.builds == builds


@pytest.mark.parametrize("width", [6, 16])
def test_cache_builds_once_and_again_after_a_change(width):
    """One build over many forwards, one more for every change of a weight or setting, none for what folds ignore."""
    layer = Counted(ODD._replace(width=width))
    layer.check(1)
    layer.weights.gru.output.mul_(1.5)
    layer.check(2)
    layer.weights.base.up.add_(0.1)
    layer.check(3)
    layer.weights.experts.lora.gate_B.mul_(2.0)
    layer.check(4)
    layer.check(5, SPEC._replace(scale=0.5))
    layer.check(6, SPEC._replace(scale=0.5, candidate_input="hidden_state"))
    layer.check(6, SPEC._replace(scale=0.5, candidate_input="hidden_state", rounds=5, normalize=False))
    experts = layer.weights.experts
    layer.weights = layer.weights._replace(experts=experts._replace(router=experts.router.clone()))
    layer.check(7, SPEC._replace(scale=0.5, candidate_input="hidden_state"))
    layer.cache.drop()
    layer.check(8, SPEC._replace(scale=0.5, candidate_input="hidden_state"))


# The names of all that the fold of a layer is computed from.
EXPERTS = ["gate_A", "gate_B", "up_A", "up_B", "down_A", "down_B"]
GRU = ["update", "reset", "candidate", "candidate_bias", "output"]
SOURCES = {
    3: ["gate", "up", "down", "down_bias", "router", *EXPERTS, *(f"gru.{name}" for name in GRU)],
    1: [*EXPERTS, "down_bias"],
}


def _in_place(weights, name):
    """The layer with one tensor written into."""
    _tensor(weights, name).mul_(1.25)
    return weights


def _replaced(weights, name):
    """The layer with another tensor in one place."""
    field, changed, experts = name.rpartition(".")[2], 1.25 * _tensor(weights, name), weights.experts
    if name in weights.base._fields:
        return weights._replace(base=weights.base._replace(**{field: changed}))
    if name.startswith("gru."):
        return weights._replace(gru=weights.gru._replace(**{field: changed}))
    if name in experts._fields:
        return weights._replace(experts=experts._replace(**{field: changed}))
    return weights._replace(experts=experts._replace(lora=experts.lora._replace(**{field: changed})))


def _tensor(weights, name):
    return (trainable(weights) | weights.base._asdict())[name]


@pytest.mark.parametrize("change", [_in_place, _replaced], ids=["in place", "replaced"])
@pytest.mark.parametrize("spec", [SPEC, ONE_ROUND], ids=["T = 3", "T = 1"])
def test_every_source_is_watched(spec, change):
    """Whichever tensor the fold reads: changing it rebuilds. A source left out is a wrong answer.

    Without later rounds the experts and the down bias are read, and a change of another tensor rebuilds nothing; with
    them the base is watched as a whole, its input biases too, which no fold reads.
    """
    counted = Counted(spec=spec)
    counted.weights = layer(spec, bias=True)
    counted.check(1, spec)
    for name in [*counted.weights.base._fields, *trainable(counted.weights)]:
        before = build_fold(counted.weights, settings(spec), copy=True).tensors()
        builds = counted.builds
        counted.weights = change(counted.weights, name)
        counted.check(builds + (name in SOURCES[1] or spec.rounds > 1), spec)
        after = build_fold(counted.weights, settings(spec)).tensors()
        read = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert read == (name in SOURCES[spec.rounds]), name


def test_one_round_uses_the_kept_experts(monkeypatch):
    """Plain MixLoRA in inference: prepared once, not at every forward, and what the literal loop gives."""
    weights = layer(ONE_ROUND, bias=True)
    kept, x = FoldCache(lambda: weights), torch.randn(4, ODD.hidden, dtype=torch.float64)
    literal = rethink_literal(x, weights, ONE_ROUND).y
    assert torch.equal(rethink(x, weights, ONE_ROUND, cache=kept).y, literal)

    def cast_experts(*_):
        raise AssertionError("prepared again")

    monkeypatch.setattr(literal_loop, "cast_experts", cast_experts)
    monkeypatch.setattr(folding, "cast_experts", cast_experts)
    for fold in ("auto", "always"):
        assert torch.equal(rethink(x, weights, ONE_ROUND, fold=fold, cache=kept).y, literal)
    with pytest.raises(AssertionError, match="prepared again"):
        rethink(x, weights, ONE_ROUND, fold="never", cache=kept)


def test_storage_given_twice_between_forwards():
    """The old storage is held: its address cannot come back as a new tensor's, with the old version counter."""
    counted = Counted()
    counted.check(1)
    for builds in range(2, 22):
        for _ in range(2):
            counted.weights.gru.output.data = 1.1 * counted.weights.gru.output
        counted.check(builds)


def test_cache_is_not_used_where_gradients_reach_the_fold():
    """Training needs the fold inside the graph: a kept one would give no gradient to W_g."""
    counted = Counted()
    counted.weights.gru.output.requires_grad_()
    x = torch.randn(40, ODD.hidden, dtype=torch.float64)
    rethink(x, counted.weights, SPEC, fold="always", cache=counted.cache).y.sum().backward()
    assert counted.builds == 0
    assert counted.weights.gru.output.grad.abs().sum() > 0


def test_kept_fold_passes_gradients_to_x():
    """Frozen weights, trainable input (saliency, prompt tuning): the kept fold is differentiated through."""
    counted = Counted()
    x = torch.randn(4, ODD.hidden, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        rethink(x.detach(), counted.weights, SPEC, cache=counted.cache)
    (found,) = torch.autograd.grad(rethink(x, counted.weights, SPEC, cache=counted.cache).y.sum(), x)
    (exact,) = torch.autograd.grad(rethink_reference(x, counted.weights, SPEC).sum(), x)
    assert counted.builds == 1
    assert relative_error(found, exact) <= 1e-12


def test_copies_start_empty():
    """A copied cache must not vouch for a fold of the original's weights."""
    counted = Counted()
    counted.check(1)
    kept = FoldCache(_no_weights)
    kept.refresh([], counted.weights, settings())
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert kept.fold is not None
        assert twin.fold is None
        assert int(twin.handle) != int(kept.handle)


def _no_weights():
    raise AssertionError("nobody asked for them")
