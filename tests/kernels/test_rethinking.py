"""The recurrence in fp64: folded against literal against Algorithm 1 word for word, and the sizes and routings at
which an implementation breaks first."""

import itertools

import pytest
import torch

from graphmoe_kernels import (
    ACTIVATIONS,
    RethinkingSpec,
    rethink,
    rethink_folded,
    rethink_literal,
    rethink_reference,
)
from graphmoe_kernels.testing import make_layer, trainable
from tests.kernels.cases import ODD, Sizes, assert_equal_to, gradients, layer
from tests.kernels.expert_operands import same_mask_in_reference

BASE = RethinkingSpec(rounds=3, top_k=2, scale=1.5)
IMPLEMENTATIONS = {"folded": rethink_folded, "literal": rethink_literal}


def check(spec, weights, x, *, backends=("torch",), x_trainable=True):
    """Every implementation against Algorithm 1: y and all gradients under a random upstream gradient."""
    upstream = torch.randn_like(x)
    options = {"x_trainable": x_trainable}
    oracle = gradients(lambda x, w: rethink_reference(x, w, spec), x, weights, upstream, **options)
    for run, backend in itertools.product(IMPLEMENTATIONS.values(), backends):
        found = gradients(
            lambda x, w, run=run, backend=backend: run(x, w, spec, backend=backend).y,
            x,
            weights,
            upstream,
            **options,
        )
        assert_equal_to(found, oracle, upstream)
    return oracle


def tokens(count: int, hidden: int = ODD.hidden) -> torch.Tensor:
    """Random fp64 inputs."""
    return torch.randn(count, hidden, dtype=torch.float64)


@pytest.mark.oracle
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("candidate_activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("candidate_input", ["expert_output", "hidden_state"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5])
def test_equals_algorithm_1(rounds, normalize, candidate_input, candidate_activation, bias):
    """The folds are identities: no option and no number of rounds may move y or any gradient."""
    spec = BASE._replace(
        rounds=rounds,
        normalize=normalize,
        candidate_input=candidate_input,
        candidate_activation=candidate_activation,
    )
    check(spec, layer(spec, bias=bias), tokens(7))


@pytest.mark.oracle
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_equals_algorithm_1(activation):
    """The folds hold for any activation, kinks included."""
    spec = BASE._replace(activation=activation)
    check(spec, layer(spec), tokens(7))


@pytest.mark.oracle
@pytest.mark.parametrize("rounds", [1, 3])
def test_reference_backend_equals_algorithm_1(rounds):
    """backend="reference" is the plain definition of each operator, and is wired the same way."""
    spec = BASE._replace(rounds=rounds)
    check(spec, layer(spec), tokens(7), backends=("reference", "auto"))


@pytest.mark.oracle
@pytest.mark.parametrize("rounds", [1, 3])
def test_frozen_input(rounds):
    """The first layer's x needs no gradient (embeddings frozen): the parameters' gradients are the same."""
    spec = BASE._replace(rounds=rounds)
    check(spec, layer(spec), tokens(7), x_trainable=False)


# Everything that can be degenerate: sizes that divide nothing, and one of each kind.
SIZES = {
    "one token": (1, Sizes(), 2),
    "k = 1": (7, Sizes(), 1),
    "k = n": (7, Sizes(), 5),
    "n = 1": (7, Sizes(experts=1), 1),
    "prime n": (7, Sizes(experts=7), 3),
    "rank 1": (7, Sizes(rank=1), 2),
    "rank 5": (7, Sizes(rank=5), 2),
    "GRU of width 1": (7, Sizes(width=1), 2),
    "GRU of width 16": (7, Sizes(width=16), 2),
    "GRU of width 17": (7, Sizes(width=17), 2),
    "D = 1": (7, Sizes(hidden=1, width=1), 2),
    "F = 1": (7, Sizes(intermediate=1), 2),
    "F < D": (7, Sizes(hidden=21, intermediate=13), 2),
    "tiles": (32, Sizes(16, 32, 4, 16, 16), 2),
}


@pytest.mark.oracle
@pytest.mark.parametrize("count, sizes, top_k", SIZES.values(), ids=SIZES)
def test_sizes(count, sizes, top_k):
    """Sizes at the edge of what a tile, a padded width or a slot can be."""
    spec = BASE._replace(top_k=top_k)
    check(spec, layer(spec, sizes), tokens(count, sizes.hidden))


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_no_tokens(run, rounds):
    """An empty batch (a rank without data) gives an empty y, zero gradients and empty logits."""
    spec = BASE._replace(rounds=rounds)
    x, weights = tokens(0), layer(spec)
    found = gradients(lambda x, w: run(x, w, spec).y, x, weights, tokens(0))
    assert found["y"].shape == (0, ODD.hidden)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found.values())
    (logits,) = run(x, weights, spec).router_logits
    assert [tuple(own.shape) for own in logits] == [(0, ODD.experts)] * rounds


@pytest.mark.oracle
@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_to_the_same_experts(top_k):
    """One group takes every pair, the others are empty: their gradients are zero, and nobody skips them."""
    spec = BASE._replace(top_k=top_k)
    weights = layer(spec)
    order = torch.tensor([3.0, 9.0, 1.0, 6.0, 0.0], dtype=torch.float64)
    # x is positive and W_g small, so these rows order the experts alike for every token in every round.
    weights = weights._replace(
        experts=weights.experts._replace(router=order[:, None] * torch.ones(5, ODD.hidden, dtype=torch.float64)),
        gru=weights.gru._replace(output=1e-3 * weights.gru.output),
    )
    x = tokens(7).abs() + 0.5
    for logits in rethink(x, weights, spec).router_logits[0]:
        assert logits.topk(top_k).indices.unique().numel() == top_k
    oracle = check(spec, weights, x)
    unused = [0, 2, 3, 4] if top_k == 1 else [0, 2, 4]
    assert torch.equal(oracle["gate_B"][unused], torch.zeros_like(oracle["gate_B"][unused]))


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_non_contiguous_input(run):
    """A sliced or transposed batch gives what a contiguous one gives, gradient included."""
    weights, x = layer(BASE), tokens(7)
    upstream = torch.randn_like(x)
    plain = gradients(lambda x, w: run(x, w, BASE).y, x, weights, upstream)
    for view in (lambda x: x.T.contiguous().T, lambda x: x.repeat(1, 2)[:, : ODD.hidden]):
        found = gradients(lambda x, w, view=view: run(view(x), w, BASE).y, x, weights, upstream)
        assert_equal_to(found, plain, upstream, 1e-14)


@pytest.mark.oracle
@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("candidate_input", ["expert_output", "hidden_state"])
def test_dropout_is_the_same_on_every_path(rounds, candidate_input, monkeypatch):
    """Folded and literal draw in the same order, so one seed gives one result: folding is no other training.

    Of the experts' reference too, given the mask that the PyTorch path draws on a CPU.
    """
    same_mask_in_reference("sorted", monkeypatch)
    spec = BASE._replace(rounds=rounds, candidate_input=candidate_input, dropout=0.3)
    weights, x = layer(spec), tokens(7)
    upstream = torch.randn_like(x)

    def seeded(run, backend):
        def call(x, w):
            torch.manual_seed(5)
            return run(x, w, spec, backend=backend).y

        return gradients(call, x, weights, upstream)

    oracle = seeded(rethink_literal, "reference")
    for run, backend in itertools.product(IMPLEMENTATIONS.values(), ("torch", "reference")):
        assert_equal_to(seeded(run, backend), oracle, upstream)
    without = spec._replace(dropout=0.0)
    assert not torch.allclose(oracle["y"], rethink_literal(x, weights, without).y, rtol=0.01)


@pytest.mark.oracle
@pytest.mark.parametrize("normalize", [True, False])
def test_router_logits_are_the_same_on_every_path(normalize):
    """Logits [T, N, n] and their gradient: the balance loss, which is made of them, must not depend on folding."""
    spec = BASE._replace(normalize=normalize, rounds=4)
    weights, x = layer(spec), tokens(9)
    upstream = torch.randn(4, 9, ODD.experts, dtype=torch.float64)

    def logits(run):
        return lambda x, w: torch.stack(run(x, w, spec).router_logits[0])

    assert_equal_to(*(gradients(logits(run), x, weights, upstream) for run in IMPLEMENTATIONS.values()), upstream)


@pytest.mark.parametrize("fold", ["auto", "always", "never"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_fold_says_how_not_what(fold, rounds):
    """Every fold mode of `rethink` gives the same y, for few tokens and for many."""
    spec = BASE._replace(rounds=rounds)
    weights = layer(spec)
    for count in (3, 300):
        x = tokens(count)
        found, exact = rethink(x, weights, spec, fold=fold).y, rethink_reference(x, weights, spec)
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_non_finite_token_stays_its_own_problem(run, bad):
    """A broken token gets a non-finite y; no other token's y changes beyond rounding, and nothing crashes."""
    weights, x = layer(BASE), tokens(9)
    clean, broken = run(x, weights, BASE).y, x.clone()
    broken[4, 3] = bad
    y = run(broken, weights, BASE).y
    others = [i for i in range(9) if i != 4]
    assert not y[4].isfinite().any()
    torch.testing.assert_close(y[others], clean[others], rtol=1e-12, atol=1e-13)


def test_weights_used_twice_are_not_changed():
    """No implementation writes into its inputs: x and every weight are bit for bit what they were."""
    weights, x = layer(BASE), tokens(9)
    before = {name: t.clone() for name, t in (trainable(weights) | {"x": x}).items()}
    before |= {f"base.{i}": t.clone() for i, t in enumerate(weights.base) if t is not None}
    for run in IMPLEMENTATIONS.values():
        run(x, weights, BASE)
    after = trainable(weights) | {"x": x}
    after |= {f"base.{i}": t for i, t in enumerate(weights.base) if t is not None}
    assert all(torch.equal(after[name], t) for name, t in before.items())


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_model_weights_under_autograd(run):
    """A trainable base (full fine-tuning next to the adapters) gets its gradients through the folds too."""
    weights, x = layer(BASE), tokens(7)
    base = weights.base._replace(**{n: getattr(weights.base, n).requires_grad_() for n in ("gate", "up", "down")})
    exact = torch.autograd.grad(rethink_reference(x, weights._replace(base=base), BASE).sum(), base[:3])
    found = torch.autograd.grad(run(x, weights._replace(base=base), BASE).y.sum(), base[:3])
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_reference_refuses_dropout():
    """The oracle has no random part: with dropout it could only be wrong."""
    with pytest.raises(ValueError, match="rethink_reference has no dropout; pass a spec with dropout=0"):
        rethink_reference(tokens(2), layer(BASE), BASE._replace(dropout=0.1))


def test_layer_maker_makes_every_term_matter():
    """The oracle tests prove nothing about a term whose weights are zero: scaling any part must move y."""
    spec, x = BASE, tokens(7)
    weights = make_layer(*ODD, bias=True)
    y = rethink_reference(x, weights, spec)
    for name in trainable(weights):
        part, _, field = name.rpartition(".")
        experts = weights.experts
        group = {"": experts.lora, "gru": weights.gru}[part]
        if name == "router":
            changed = weights._replace(experts=experts._replace(router=1.5 * experts.router))
        elif part == "gru":
            changed = weights._replace(gru=group._replace(**{field: 1.5 * getattr(group, field)}))
        else:
            lora = group._replace(**{field: 1.5 * getattr(group, field)})
            changed = weights._replace(experts=experts._replace(lora=lora))
        moved = (rethink_reference(x, changed, spec) - y).norm() / y.norm()
        assert moved > 1e-3, f"{name} moves y by {moved:.1e} only"
